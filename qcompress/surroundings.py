"""What refining asks of a model, in memory or opened: the true losses of choices, and a measurement around one."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qcompress.compressed.apply import require_measured
from qcompress.measurement import Measurement
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.remeasure import measured_at
from qcompress.measuring.true_loss import TrueLoss
from qcompress.model.calibration import Calibration
from qcompress.model.opened import opened_of
from qcompress.streaming.losses import losses_of
from qcompress.streaming.remeasuring import measured_around

Choice = NDArray[np.int64]
OnProgress = Callable[[MeasureProgress], None] | None


class Surroundings(Protocol):
    """A measured model whose choices are run."""

    def losses(self, choices: Sequence[Choice]) -> list[float]:
        """Return the mean loss increase of every choice on the data; infinite if it is not finite."""

    def measured(self, choice: Choice, loss: float, cache: Path | None, on_progress: OnProgress) -> Measurement:
        """Return the measurement around a choice.

        Args:
            choice: the choice.
            loss: its loss.
            cache: file or folder to resume from, which stays.
            on_progress: same as in `measure`.
        """


def surroundings_of(
    calibration: Calibration, measurement: Measurement, code: str, memory: int | str | None = None
) -> Surroundings:
    """Return the surroundings in a model.

    Args:
        calibration: the model, data, loss and forward.
        measurement: measurement of the model.
        code: digest of the options' code.
        memory: memory limit, for an opened model.
    """
    if opened_of(calibration.model) is None:
        return SurroundingsInMemory(calibration, measurement, code)
    return SurroundingsByBlock(calibration, measurement, code, memory)


class SurroundingsInMemory:
    """Surroundings in a model in memory; its data is kept in memory with the original's outputs."""

    def __init__(self, calibration: Calibration, measurement: Measurement, code: str) -> None:
        self._calibration, self._measurement, self._code = calibration, measurement, code
        self._true_loss = TrueLoss(
            calibration.model, measurement, calibration.data, loss=calibration.loss, forward=calibration.forward
        )

    def losses(self, choices: Sequence[Choice]) -> list[float]:
        """See `Surroundings`."""
        return [self._true_loss(choice) for choice in choices]

    def measured(self, choice: Choice, loss: float, cache: Path | None, on_progress: OnProgress) -> Measurement:
        """See `Surroundings`."""
        emulation = self._true_loss.emulation
        emulation.put(choice)
        return measured_at(self._calibration, self._measurement, emulation, loss, self._code, cache, on_progress)


class SurroundingsByBlock:
    """Surroundings in an opened model, whose blocks are read once for all choices that are given together."""

    def __init__(self, calibration: Calibration, measurement: Measurement, code: str, memory: int | str | None) -> None:
        require_measured(calibration.model, measurement.model_fingerprint)
        self._calibration, self._measurement, self._code, self._memory = calibration, measurement, code, memory

    def losses(self, choices: Sequence[Choice]) -> list[float]:
        """See `Surroundings`."""
        own = self._calibration
        transforms = [
            tuple(options[option] for options, option in zip(self._measurement.transforms, choice, strict=True))
            for choice in choices
        ]
        rises = losses_of(
            own.model, self._measurement, transforms, own.data, own.data, loss=own.loss, forward=own.forward
        )
        means = [math.inf if samples is None else float(samples.mean()) for samples in rises]
        return [mean if math.isfinite(mean) else math.inf for mean in means]

    def measured(self, choice: Choice, loss: float, cache: Path | None, on_progress: OnProgress) -> Measurement:  # noqa: ARG002
        """See `Surroundings`."""
        return measured_around(
            self._calibration, self._measurement, choice, self._code, cache=cache, keep=True, memory=self._memory,
            on_progress=on_progress,
        )  # fmt: skip
