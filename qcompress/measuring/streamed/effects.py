"""Effects of all options of an opened model from weight gradients (see `weight_gradients`), one block in memory.

In the forward direction, all samples pass through the blocks one after the other. At the output a label is drawn for
every position, and the gradient is propagated back the same way: each block is run again and its options are encoded,
multiplied with the weight gradients of every sample, and dropped. Only one number per option and sample is kept, its
effect. The effects give the costs with their standard errors, and the terms between parts: they are the columns of the
factor.

Everything outside the blocks is measured in the same way where the gradient passes: the layers after the blocks at the
start of the backward direction, those before the blocks at its end (see also `side_inputs`). On the first sample, the
outputs of every unit are compared with what its gradients predict (`unit_check`), as far as the loss depends on them:
at padded positions an embedding with ``padding_idx`` has no gradient.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from formulations.file_kinds import FileKind
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.memory import return_free_memory
from qcompress.measuring.methods import evidence
from qcompress.measuring.methods.evidence import half
from qcompress.measuring.methods.gradients import Gradients
from qcompress.measuring.streamed.hidden_states import HiddenStates
from qcompress.measuring.streamed.side_inputs import SideInputs, before_and_after
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.measuring.streamed.unit_check import Output, misled
from qcompress.model.losses import Loss
from qcompress.model.padding import at_real_positions
from qcompress.model.parts import Part
from qcompress.options import transform_from_json
from qcompress.transforms.base import Transform

FILE_KIND = FileKind("qcompress effects", version=2)

WorkOut = Callable[[Sequence[Part], int | None], tuple[Candidates, NDArray[np.float64]]]
"""Parts, and the block that they are in (None: outside) → their options and the squared errors of these."""

Start = Callable[[int, Tensor], Tensor]
"""Index of a sample, and the model's output for it → what is propagated back from there, of the output's shape."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitEffects:
    """Results of a unit (a block, or the layers outside the blocks).

    Attributes:
        parts: names of the parts.
        transforms: the options of each part.
        effects: ``(options, columns)``.
        errors: ``(options,)`` squared errors.
        unreached: names of parts that no gradient reached.
        misled: names of parts whose gradient the outputs do not follow.
    """

    parts: tuple[str, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    effects: NDArray[np.float64]
    errors: NDArray[np.float64]
    unreached: tuple[str, ...]
    misled: tuple[str, ...]

    def split(self, values: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Return those of some values ``(options, ...)`` that belong to each part."""
        return np.split(values, np.cumsum([len(options) for options in self.transforms], dtype=np.int64))[:-1]

    def save(self, path: Path) -> None:
        """Write to a file, completely or not at all."""
        options = [[transform.to_json() for transform in part_options] for part_options in self.transforms]
        names = {"parts": list(self.parts), "unreached": list(self.unreached), "misled": list(self.misled)}
        arrays = {"effects": self.effects, "errors": self.errors}
        FILE_KIND.write_arrays(path, {**names, "transforms": options}, arrays)

    @classmethod
    def load(cls, path: Path) -> "UnitEffects":
        """Read a file that `save` wrote."""
        header, arrays = FILE_KIND.read_arrays(path)
        return cls(
            parts=tuple(header["parts"]),
            transforms=tuple(tuple(map(transform_from_json, options)) for options in header["transforms"]),
            unreached=tuple(header["unreached"]),
            misled=tuple(header["misled"]),
            **arrays,
        )


UNREACHED = "no gradient reaches it, so the effect of its options is unknown"
MISLED = f"{evidence.MISLED}, so the effect of its options is unknown"


def effects_of_parts(units: Iterable[UnitEffects]) -> dict[str, NDArray[np.float64]]:
    """Name of a part → ``(options, columns)``; the effects of a part that is in two units are added."""
    effects: dict[str, NDArray[np.float64]] = {}
    for unit in units:
        for name, own in zip(unit.parts, unit.split(unit.effects), strict=True):
            effects[name] = effects.get(name, 0.0) + own
    return effects


def unknown_parts(units: Iterable[UnitEffects]) -> dict[str, str]:
    """Name of each part whose effects are unknown → why."""
    units = tuple(units)
    reached = set().union(*(set(unit.parts) - set(unit.unreached) for unit in units))
    unreached = {name: UNREACHED for unit in units for name in unit.parts if name not in reached}
    return unreached | {name: MISLED for unit in units for name in unit.misled}


def probes(sweep: BlockSweep, loss: Loss, generator: Callable[[int], torch.Generator]) -> Start:
    """Return the start that samples the loss's Fisher information at the model's own outputs.

    Args:
        sweep: the samples.
        loss: the loss.
        generator: function that gives the generator for the labels of the batch with a number.
    """
    generators: dict[int, torch.Generator] = {}

    def probe(sample: int, output: Tensor) -> Tensor:
        number = sweep.samples[sample].batch
        if number not in generators:
            generators[number] = generator(number)
        return loss.probe(output, sweep.samples[sample].inputs, generators[number])

    return probe


class StreamedEffects:
    """The effects of all options, unit by unit from the model's end to its beginning.

    Args:
        sweep: the samples.
        parts: parts of the model.
        work_out: function that encodes the options of a unit's parts while their weights are in memory.
        starts: what is propagated back from the output, one after the other for all samples: columns of the effects.
        room: bytes of changes and gradients that may be held, see `Gradients`.
        check: whether to check the gradients of every unit.

    Attributes:
        reached: names of the parts that received a gradient in each column, of the units that were not read from file.
    """

    def __init__(
        self,
        sweep: BlockSweep,
        parts: Sequence[Part],
        work_out: WorkOut,
        starts: Sequence[Start],
        room: int,
        *,
        check: bool,
    ) -> None:
        self._sweep, self._work_out, self._starts = sweep, work_out, starts
        self._room, self._check = room, check
        self.reached: list[set[str]] = [set() for _ in range(len(starts) * len(sweep))]
        self._of_block: list[list[Part]] = [[] for _ in sweep.opened.blocks]
        outside: list[Part] = []
        for part in parts:
            block = sweep.opened.block_of(part.modules[0])
            (outside if block is None else self._of_block[block]).append(part)
        self._before, self._after = before_and_after(sweep, outside)
        weights = [part.site(sweep.model).weight for part in self._before]
        self._sides = SideInputs(sweep, weights, passes=len(starts))

    @property
    def files(self) -> list[Path]:
        """The files of all units."""
        names = ["after", *(f"{index:04}" for index in range(len(self._of_block))), "before"]
        return [self._sweep.folder / f"effects_{name}.npz" for name in names]

    def units(self) -> Iterator[UnitEffects]:
        """Yield every unit's effects as they are computed; existing files are read instead."""
        after, *blocks, before = self.files
        last = len(blocks)
        yield from self._once(after, last, self._after_blocks)
        for index in reversed(range(last)):
            yield from self._once(blocks[index], index, functools.partial(self._block, index))
        yield from self._once(before, None, self._before_blocks)
        self._sides.delete()

    def _once(self, file: Path, boundary: int | None, make: Callable[[], UnitEffects]) -> Iterator[UnitEffects]:
        if not file.exists():
            make().save(file)
        if boundary is not None:
            self._gradients(boundary + 1).delete()  # the unit's file was computed from them
        yield UnitEffects.load(file)

    def _after_blocks(self) -> UnitEffects:
        sweep, last = self._sweep, len(self._sweep.chain)

        def passed(column: int, gradients: Gradients) -> None:
            start, sample = divmod(column, len(sweep))
            hidden = sweep.hidden(last, sample).requires_grad_()
            output = sweep.output(sample, hidden)
            gradients.add(output, self._starts[start](sample, output.detach()))
            assert hidden.grad is not None  # noqa: S101
            put(hidden.grad)

        with self._gradients(last).writing() as put:
            first = sweep.samples[0].inputs
            wrong = self._misled(self._after, last, lambda hidden: at_real_positions(first, sweep.output(0, hidden)))
            return self._unit(self._after, None, passed, wrong)

    def _block(self, block: int) -> UnitEffects:
        sweep = self._sweep
        behind = self._gradients(block + 1)

        def passed(column: int, gradients: Gradients) -> None:
            sample = column % len(sweep)
            hidden = sweep.hidden(block, sample).requires_grad_()
            output, sides = self._sides.through(block, sample, hidden)
            gradients.add(output, behind.read(column))
            assert hidden.grad is not None  # noqa: S101
            put(hidden.grad)
            put_sides(sides)

        with (
            sweep.opened.loaded(sweep.opened.blocks[block]),
            self._gradients(block).writing() as put,
            self._sides.writing(block) as put_sides,
        ):
            seen = behind.read(0) != 0
            wrong = self._misled(self._of_block[block], block, lambda hidden: sweep.through(block, 0, hidden)[seen])
            return self._unit(self._of_block[block], block, passed, wrong)

    def _before_blocks(self) -> UnitEffects:
        sweep = self._sweep
        behind = self._gradients(0)

        def passed(column: int, gradients: Gradients) -> None:
            given = self._sides.given(column % len(sweep))
            behind_them = [behind.read(column), *self._sides.gradients(column)]
            products = [(state.float() * gradient).sum() for state, gradient in zip(given, behind_them, strict=True)]
            gradients.add(torch.stack(products), torch.ones(len(products)))

        seen = [gradient != 0 for gradient in (behind.read(0), *self._sides.gradients(0))]

        def everything(_: Tensor) -> Tensor:
            given = self._sides.given(0)
            rounded = next((state.dtype for state in given if half(state)), torch.float32)  # what the check must know
            return torch.cat([state[where].to(rounded) for state, where in zip(given, seen, strict=True)])

        return self._unit(self._before, None, passed, self._misled(self._before, -1, everything))

    def _gradients(self, boundary: int) -> HiddenStates:
        """Return the gradients of the states before a block, of every column."""
        return self._sweep.states(boundary, "gradients", len(self._starts))

    def _misled(self, parts: Sequence[Part], block: int, output: Output) -> set[str]:
        return misled(self._sweep, parts, block, output) if self._check else set()

    def _unit(
        self,
        parts: Sequence[Part],
        block: int | None,
        passed: Callable[[int, Gradients], None],
        wrong: set[str],
    ) -> UnitEffects:
        """Compute the effects of a unit.

        Args:
            parts: parts of the unit, whose weights are in memory.
            block: index of the block that the parts are in.
            passed: function that adds a column with the given number, by running a sample forward and backward.
            wrong: names of the parts whose gradient the outputs do not follow.
        """
        with torch.no_grad():
            candidates, errors = self._work_out(parts, block)
        names = {layer: [parts[part].name for part in layer.parts] for layer in candidates.layers}
        with torch.enable_grad(), Gradients(self._sweep.model, candidates, self._room) as gradients:
            for column in range(len(self.reached)):
                passed(column, gradients)
            effects = gradients.effects()
        return_free_memory()  # pieces of this unit's gradients, which the next one's do not fit into
        for reached, layers in zip(self.reached, gradients.reached, strict=True):
            reached.update(name for layer in layers for name in names[layer])
        seen = set().union(*self.reached)
        return UnitEffects(
            parts=tuple(part.name for part in parts),
            transforms=candidates.transforms,
            effects=effects,
            errors=errors,
            unreached=tuple(part.name for part in parts if part.name not in seen),
            misled=tuple(part.name for part in parts if part.name in wrong),
        )
