"""Progress reports of a measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureProgress:
    """Progress of a measurement; ``total_batches`` is None when the data has no length.

    Attributes:
        batches, total_batches: number of batches done, and of all batches.
        num_samples: number of samples so far; for an opened model, of all samples.
        elapsed_s: seconds elapsed.
        unit: what is counted: batches, and at the end samples that options are run on alone; for an opened model the
            blocks, forward, backward and forward again with these options.
    """

    batches: int
    total_batches: int | None
    num_samples: int
    elapsed_s: float
    unit: str = "batches"


def block_progress(
    on_progress: Callable[[MeasureProgress], None] | None, *, num_samples: int, total: int
) -> Callable[[int], None]:
    """Return a function that reports how many of ``total`` blocks are done."""
    start = time.perf_counter()

    def tell(done: int) -> None:
        if on_progress is not None:
            elapsed_s = time.perf_counter() - start
            on_progress(
                MeasureProgress(
                    batches=done, total_batches=total, num_samples=num_samples, elapsed_s=elapsed_s, unit="blocks"
                )
            )

    return tell
