"""The samples of some data in an opened model and in the model with a choice, and the options around the choice."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.memory import HELD
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.streamed.forecast import resident_bytes, room_left
from qcompress.measuring.streamed.forecast_memory import unit_forecasts
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.chain import without_cache
from qcompress.model.losses import Loss
from qcompress.model.opened import Opened, opened_of
from qcompress.model.parts import Part
from qcompress.model.steady import steady
from qcompress.options import Options
from qcompress.streaming.applying import applied
from qcompress.streaming.encoding import Unit, encoded, loaded
from qcompress.transforms.base import Keep


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Around:
    """A choice in an opened model.

    Attributes:
        measurement: measurement of the model.
        standing: option of every part.
        loss: the loss.
        original: the samples in the original.
        changed: the samples in the model with the choice.
    """

    measurement: Measurement
    standing: Sequence[int]
    loss: Loss
    original: BlockSweep
    changed: BlockSweep

    def room(self, limit: int | None) -> int:
        """Return the bytes that `Gradients` may hold; the original's block and its rows are in memory as well.

        Raises:
            OptionsError: even the largest unit does not fit.
        """
        if limit is None:
            return HELD
        parts, sweep = self.measurement.parts, self.changed
        options = {part.name: Options(own) for part, own in zip(parts, self.measurement.transforms, strict=True)}
        output = sweep.output(0, torch.ones(sweep.shapes[0], dtype=sweep.dtype))
        units = unit_forecasts(sweep, parts, options, output, limit)
        units = [replace(unit, weights=3 * unit.weights) for unit in units]
        return room_left(limit, resident_bytes(), units, HELD)

    @torch.no_grad()
    def slope(self, sample: int, output: Tensor) -> Tensor:
        """Return the gradient of the loss at the output of the model with the choice."""
        gradient = self.loss.gradient(output, self.original.samples[sample].inputs, self.original.output(sample))
        assert gradient is not None  # noqa: S101
        return gradient.to(output.dtype)

    @torch.no_grad()
    def standing_loss(self) -> float:
        """Return the loss of the choice."""
        rises = [
            self.loss.rise(self.changed.output(place), self.original.output(place), sample.inputs)
            for place, sample in enumerate(self.original.samples)
        ]
        return float(torch.cat(rises).double().mean())

    def work_out(self, parts: Sequence[Part], block: int | None) -> tuple[Candidates, NDArray[np.float64]]:
        """Encode the options of a unit from the original's weights."""
        known, model = self.measurement, self.original.model
        places = {part.name: place for place, part in enumerate(known.parts)}
        unit = Unit(name="", block=block, parts=tuple(places[part.name] for part in parts))
        with loaded(_opened(model), unit):
            codes = encoded(model, known, unit, dict(enumerate(known.transforms)), self.original)
            weights = {place: known.parts[place].weight(model) for place in unit.parts if self.standing[place]}
            kept = {place: weight if block is None else weight.clone() for place, weight in weights.items()}

        def rows(part: int, option: int) -> Tensor:
            place = unit.parts[part]
            transform, weight = known.transforms[place][option], parts[part].weight(self.changed.model)
            if isinstance(transform, Keep):
                return kept[place].clone()
            return transform.decode(codes[place, transform], parts[part].target).to(weight)

        candidates = Candidates(
            self.changed.model,
            tuple(parts),
            [known.transforms[place] for place in unit.parts],
            rows,
            [self.standing[place] for place in unit.parts],
            overwritable=True,
        )
        return candidates, np.zeros(candidates.num_options)

    def telling(self, on_progress: Callable[[MeasureProgress], None] | None) -> Callable[[int], None]:
        """Return a function that reports how many of all blocks are done."""
        start, total = time.perf_counter(), 3 * len(self.original.chain) + 2

        def tell(done: int) -> None:
            if on_progress is not None:
                seconds, samples = time.perf_counter() - start, len(self.original)
                on_progress(
                    MeasureProgress(
                        batches=done, total_batches=total, num_samples=samples, elapsed_s=seconds, unit="blocks"
                    )
                )

        return tell


@contextlib.contextmanager
def around_choice(
    calibration: Calibration, measurement: Measurement, standing: Sequence[int], data: list[Any], folder: Path
) -> Iterator[Around]:
    """Yield the samples in both models; the codes of the choice are written to the folder."""
    model, run = calibration.model, steady(calibration.forward, calibration.seed)
    transforms = [options[option] for options, option in zip(measurement.transforms, standing, strict=True)]
    changed = applied(model, measurement, transforms, calibration.forward, data, folder / "codes")
    with contextlib.ExitStack() as stack:
        stack.enter_context(forwards.layer_by_layer())
        sweeps = {}
        for name, own in (("original", model), ("changed", changed)):
            stack.enter_context(forwards.evaluating(own))
            stack.enter_context(without_cache(own))
            (folder / name).mkdir(exist_ok=True)
            sweeps[name] = BlockSweep(own, _opened(own), data, run, folder / name)
        yield Around(measurement=measurement, standing=standing, loss=calibration.loss, **sweeps)


def _opened(model: nn.Module) -> Opened:
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    return opened
