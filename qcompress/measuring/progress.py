"""Where a measurement stands, for those who wait for it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureProgress:
    """Where a measurement stands; ``total_batches`` is None when the data does not tell its length.

    Attributes:
        batches, total_batches: how many are done, and are.
        num_samples: so far; of an opened model all that there are.
        elapsed_s: so far.
        unit: what is counted: of an opened model the blocks, forward and backward.
    """

    batches: int
    total_batches: int | None
    num_samples: int
    elapsed_s: float
    unit: str = "batches"
