"""The samples of some data in an opened model and in the model with a choice, and the options around the choice."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.memory import HELD
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.streamed.forecast import resident_bytes, room_left
from qcompress.measuring.streamed.forecast_memory import forecast_memory, unit_forecasts
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.blocks import Blocks
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
        room: bytes that `Gradients` may hold.
    """

    measurement: Measurement
    standing: Sequence[int]
    loss: Loss
    original: BlockSweep
    changed: BlockSweep
    room: int

    @torch.no_grad()
    def slope(self, sample: int, output: Tensor) -> Tensor:
        """Return the gradient of the loss at the output of the model with the choice."""
        gradient = self.loss.gradient(output, self.original.samples[sample].inputs, self.original.output(sample))
        assert gradient is not None  # noqa: S101
        return gradient

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
            kept = {place: known.parts[place].weight(model) for place in unit.parts if self.standing[place]}

        def rows(part: int, option: int) -> Tensor:
            place = unit.parts[part]
            transform, weight = known.transforms[place][option], parts[part].weight(self.changed.model)
            if isinstance(transform, Keep):
                return kept[place]
            return transform.decode(codes[place, transform], parts[part].target).to(weight)

        candidates = Candidates(
            self.changed.model,
            tuple(parts),
            [known.transforms[place] for place in unit.parts],
            rows,
            [self.standing[place] for place in unit.parts],
        )
        return candidates, np.zeros(candidates.num_options)


@contextlib.contextmanager
def around_choice(
    calibration: Calibration, measurement: Measurement, standing: Sequence[int], folder: Path, limit: int | None
) -> Iterator[Around]:
    """Yield the samples in both models; the codes of the choice are written to the folder.

    Raises:
        OptionsError: even the largest unit does not fit into ``limit`` bytes.
    """
    model, run = calibration.model, steady(calibration.forward, calibration.seed)
    data = list(calibration.data)
    transforms = [options[option] for options, option in zip(measurement.transforms, standing, strict=True)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(forwards.layer_by_layer())

        def sweep(name: str, own: nn.Module) -> BlockSweep:
            stack.enter_context(forwards.evaluating(own))
            stack.enter_context(without_cache(own))
            (folder / name).mkdir(exist_ok=True)
            return BlockSweep(own, _opened(own), data, run, folder / name)

        original = sweep("original", model)
        room = HELD if limit is None else _room(original, measurement, limit)
        chosen = applied(model, measurement, transforms, calibration.forward, data, folder / "codes")
        changed = sweep("changed", chosen)
        yield Around(
            measurement=measurement, standing=standing, loss=calibration.loss, original=original, changed=changed,
            room=room,
        )  # fmt: skip


def require_room_around(calibration: Calibration, data: Iterable[Any], offered: Offered, limit: int) -> None:
    """Check that the options of an opened model can be measured around a choice within some memory.

    Raises:
        OptionsError: it takes more than ``limit`` bytes.
    """
    model = calibration.model
    needed = forecast_memory(model, data, offered, calibration.loss, calibration.forward) + _beside(_opened(model))
    if needed > limit:
        raise OptionsError(
            f"memory={limit / 1e9:.3g} GB was given, but about {needed / 1e9:.3g} GB are needed to measure around the "
            "choice, where two models are read (refine_rounds=): give more memory, or do not refine"
        )


def _room(sweep: BlockSweep, measurement: Measurement, limit: int) -> int:
    options = {part.name: Options(own) for part, own in zip(measurement.parts, measurement.transforms, strict=True)}
    output = sweep.output(0, torch.ones(sweep.shapes[0], dtype=sweep.dtype))
    units = unit_forecasts(sweep, measurement.parts, options, output, limit)
    beside = _beside(sweep.opened)
    return room_left(limit, resident_bytes(), [replace(unit, weights=unit.weights + beside) for unit in units], HELD)


def _beside(opened: Blocks) -> int:
    """Return the bytes that the model with a choice takes in memory beside the original."""
    return opened.outside_bytes + max(map(opened.block_bytes, opened.blocks))


def _opened(model: nn.Module) -> Opened:
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    return opened
