"""Encode the chosen options of an opened model, block by block."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.streamed.inputs import inputs_of
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.opened import Opened
from qcompress.model.parts import weights_of
from qcompress.transforms.base import Keep, Transform

Codes = dict[tuple[int, Transform], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Parts whose weights are in memory together.

    Attributes:
        name: name of the block's file, or ``"outside"``.
        block: index of the block, None for the parts outside the blocks.
        parts: indices into the measurement's parts.
    """

    name: str
    block: int | None
    parts: tuple[int, ...]


def units_of(opened: Opened, measurement: Measurement) -> list[Unit]:
    """Return the parts outside the blocks as the first unit, then the blocks."""
    of_block: dict[int | None, list[int]] = {}
    for index, part in enumerate(measurement.parts):
        of_block.setdefault(opened.block_of(part.modules[0]), []).append(index)
    outside = Unit(name="outside", block=None, parts=tuple(of_block.get(None, ())))
    blocks = [
        Unit(name=f"block_{number:04}", block=number, parts=tuple(of_block.get(number, ())))
        for number in range(len(opened.blocks))
    ]
    return [outside, *blocks]


def need_inputs(measurement: Measurement, wanted: Mapping[int, Sequence[Transform]]) -> bool:
    """Whether any of the wanted transforms is fitted to layer inputs."""
    return any(
        transform.needs_moments(target) or transform.needs_squares(target)
        for part, transforms in wanted.items()
        for target in (measurement.parts[part].target,)
        for transform in transforms
    )


def reporter(
    measurement: Measurement, units: Sequence[Unit], tell: Callable[[EncodeProgress], None] | None
) -> Callable[[Unit, Codes], None]:
    """Return a function to call with every one of some units when it is encoded, which reports progress to ``tell``.

    Parts of other units count as done; an interrupted call encoded them.
    """
    start, weights = time.perf_counter(), [part.target.num_weights for part in measurement.parts]
    wanted, done = sum(len(unit.parts) for unit in units), list[int]()
    wanted_weights = sum(weights[part] for unit in units for part in unit.parts)

    def report(unit: Unit, codes: Codes) -> None:
        done.extend(unit.parts)
        if tell is None or not codes:  # parts that stay as they are take no time
            return
        elapsed_s, done_weights = time.perf_counter() - start, sum(weights[part] for part in done)
        tell(
            EncodeProgress(
                part=measurement.parts[done[-1]].name,
                parts=len(weights) - wanted + len(done),
                total_parts=len(weights),
                elapsed_s=elapsed_s,
                remaining_s=elapsed_s / done_weights * (wanted_weights - done_weights),
                size_bytes=sum(tensor.nbytes for arrays in codes.values() for tensor in arrays.values()),
            )
        )

    return report


@contextlib.contextmanager
def loaded(opened: Opened, unit: Unit) -> Iterator[None]:
    """Return a context that keeps the unit's weights in memory."""
    with contextlib.nullcontext() if unit.block is None else opened.loaded(opened.blocks[unit.block]):
        yield


def encoded(
    model: nn.Module,
    measurement: Measurement,
    unit: Unit,
    wanted: Mapping[int, Sequence[Transform]],
    sweep: BlockSweep | None,
) -> Codes:
    """Encode the wanted transforms of a unit whose weights are in memory.

    Args:
        model: an opened model.
        measurement: measurement of the model.
        unit: the unit to encode.
        wanted: part → transforms; parts of other units are ignored.
        sweep: a sweep that has gone forward, if any transform is fitted to inputs.
    """
    encoded_parts = [part for part in unit.parts if any(not isinstance(item, Keep) for item in wanted.get(part, ()))]
    parts = [measurement.parts[part] for part in encoded_parts]
    needs = {measurement.parts[part].name: wanted[part] for part in encoded_parts}
    inputs = inputs_of(model, sweep, unit.block, parts, needs)
    codes: Codes = {}
    with torch.no_grad():
        for part, weight in zip(encoded_parts, weights_of(model, parts, *inputs), strict=True):
            for transform in dict.fromkeys(wanted[part]):
                if not isinstance(transform, Keep):
                    codes[part, transform] = transform.encode(weight)
    return codes
