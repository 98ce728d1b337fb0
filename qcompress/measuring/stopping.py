"""Stop measuring before all batches are done: once predictions are precise enough, or after a time limit."""

from dataclasses import dataclass

import numpy as np

from qcompress.errors import DataError, OptionsError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.effects import likely_choices
from qcompress.measuring.sums import Sums, error_of_sum
from qcompress.scalars import as_number

LEAST_SAMPLES = 8
"""Minimum number of samples for a standard error to be trusted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Conditions for measuring to stop.

    Attributes:
        precision: relative standard error of predictions at which measuring stops, or None.
        time_limit: seconds after which measuring stops, or None.
    """

    precision: float | None = None
    time_limit: float | None = None

    @classmethod
    def of(cls, precision: float | None, time_limit: float | None, method: str, *, by_block: bool) -> "Stop":
        """Check the arguments of `qcompress.measure`.

        Raises:
            OptionsError: a number is not positive, or the method of measuring cannot stop early.
        """
        if precision is None and time_limit is None:
            return cls()
        if by_block:
            raise OptionsError(
                "all samples of an opened model pass through a block together: give fewer samples instead of precision "
                "or time_limit"
            )
        if precision is not None and method != "sampled":
            raise OptionsError(
                f"precision= needs method='sampled', which estimates it from samples; found method={method!r}"
            )
        return cls(
            precision=None if precision is None else as_number(precision, "precision", above=0),
            time_limit=None if time_limit is None else as_number(time_limit, "time_limit", above=0),
        )

    def reason(self, sums: Sums, candidates: Candidates, elapsed_s: float) -> str:
        """Return why measuring stops with these sums, or an empty string."""
        if self.precision is not None and sums.num_columns >= LEAST_SAMPLES:
            error = relative_error(sums, candidates)
            if error <= self.precision:
                return f"predictions have a relative standard error of {error:.3g}, asked for was {self.precision:g}"
        return self._out_of_time if self.time_limit is not None and elapsed_s >= self.time_limit else ""

    @property
    def _out_of_time(self) -> str:
        return f"time_limit={self.time_limit:g} seconds"

    def ended_by_time(self, sums: Sums) -> bool:
        """Whether the time limit is why measuring stopped."""
        return self.time_limit is not None and sums.stopped == self._out_of_time

    def notes(self, sums: Sums, candidates: Candidates, num_batches: int) -> list[str]:
        """Return notes on batches that were left out, and on a precision that was not reached.

        Args:
            sums: the sums at the end of measuring.
            candidates: the options.
            num_batches: number of batches in the data.

        Raises:
            DataError: without having stopped early, another number of batches was measured.
        """
        if not sums.stopped and sums.num_batches != num_batches:
            raise DataError(
                f"the data gave {num_batches} batches in one pass and {sums.num_batches} in another: it must be the "
                "same in every pass"
            )
        notes = [f"{sums.num_batches} of {num_batches} batches were measured: {sums.stopped}"] if sums.stopped else []
        if self.precision is None:
            return notes
        reached, ended = relative_error(sums, candidates), "measuring stopped" if sums.stopped else "the data ended"
        if sums.num_columns < LEAST_SAMPLES:
            few = f"after {sums.num_columns} samples, of the {LEAST_SAMPLES} that an estimate of the precision needs"
            notes.append(f"{ended} {few}; precision asked for was {self.precision:g}")
        elif reached > self.precision:
            at_error = f"at a relative standard error of {reached:.3g}"
            notes.append(f"{ended} {at_error}; precision asked for was {self.precision:g}")
        return notes


NEVER = Stop()


def relative_error(sums: Sums, candidates: Candidates) -> float:
    """Return the largest relative standard error of the predicted losses of likely choices, from mild to harsh."""
    own = sums.standard_error()
    if own is None:
        return float("inf")
    halves = 0.5 * np.square(sums.factor())
    choices = likely_choices(sums.mean_cost(), candidates.size_bytes, candidates.offsets)
    errors = [
        error_of_sum(halves[chosen], own[chosen], sums.num_samples) / total
        for chosen in choices
        if (total := float(halves[chosen].sum())) > 0
    ]
    return max(errors, default=0.0)
