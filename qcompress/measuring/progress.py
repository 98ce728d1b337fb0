"""Progress reports of a measurement."""

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
