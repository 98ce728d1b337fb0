"""The true loss increase of single options of an opened model, see `reruns`: every block is read once for all of them.

An option changes nothing before its block, so the hidden states that reach the block are the original's. Codes are
computed again, because keeping them for all options would take too much memory. Blocks in half precision run in
float32; the layers after the blocks keep their precision, and the cost of their rounding is measured by perturbing the
states that reach them as rounding does.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.errors import NotFiniteError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.memory import return_free_memory
from qcompress.measuring.methods.evidence import half
from qcompress.measuring.methods.gradient_check import widened
from qcompress.measuring.methods.reruns import sample_places
from qcompress.measuring.streamed.hidden_states import HiddenStates
from qcompress.measuring.streamed.inputs import inputs_of
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss
from qcompress.model.parts import Part, weights_of
from qcompress.model.scores import random_numbers
from qcompress.transforms.base import Keep, Transform

Applied = Callable[[], contextlib.AbstractContextManager[None]]
"""Function that returns a context manager in which an option is in the model."""

ORIGINAL = -1
"""The original among the runs, which are counted from 0."""


class RunsByBlock:
    """Runs of single options of an opened model.

    Args:
        sweep: the samples, which have gone forward.
        runs: part and transform of every option.
        loss: the loss.
    """

    def __init__(self, sweep: BlockSweep, runs: Sequence[tuple[Part, Transform]], loss: Loss) -> None:
        self._sweep, self._runs, self._loss = sweep, runs, loss
        self._half = half(torch.empty(0, dtype=sweep.dtype))
        self._places = sample_places(len(sweep))
        self._outside: dict[int, Applied] = {}

    @torch.no_grad()
    def rises(self, tell: Callable[[int], None]) -> tuple[NDArray[np.float64], list[int], float] | None:
        """Return ``(runs, samples)`` loss increases (NaN if not finite), sample sizes, and the increase by rounding.

        None if a block in half precision does not run in float32.

        Args:
            tell: called with the number of blocks that are done.
        """
        sweep = self._sweep
        self._outside = self._encoded(None)
        under_way = [ORIGINAL, *self._outside]
        for run in under_way:
            with self._put(run), self._states(0, run).writing() as put:
                for place in self._places:
                    put(sweep.hidden(0, place))
        for block, path in enumerate(sweep.opened.blocks):
            with sweep.opened.loaded(path) as module:
                inside = self._encoded(block)
                with widened(module) as wide:
                    try:
                        self._through(block, ORIGINAL)
                    except Exception as error:
                        if not wide or forwards.is_out_of_memory(error):
                            raise
                        return None
                    for run in under_way[1:]:
                        self._through(block, run)
                    for run, applied in inside.items():
                        with applied():
                            self._through(block, run, ORIGINAL)
            for run in under_way:
                self._states(block, run).delete()
            under_way += inside
            return_free_memory()
            tell(block + 1)
        rises = np.array([self._rises(number, place) for number, place in enumerate(self._places)])
        sizes = [sweep.sizes[place] for place in self._places]
        return rises[:, :-1].T, sizes, float(np.average(rises[:, -1], weights=sizes))

    def _states(self, boundary: int, run: int) -> HiddenStates:
        shapes = [self._sweep.shapes[place] for place in self._places]
        path = self._sweep.folder / f"alone_{boundary:04}_{run + 1:04}.bin"
        return HiddenStates(path, shapes, torch.float32 if self._half else self._sweep.dtype)

    def _put(self, run: int) -> contextlib.AbstractContextManager[None]:
        """Apply an option of a part outside the blocks; restore the weight on exit."""
        return self._outside.get(run, contextlib.nullcontext)()

    def _through(self, block: int, run: int, start: int | None = None) -> None:
        """Run the samples through a block; with ``start``, from the states of that run."""
        before = self._states(block, run if start is None else start)
        with self._put(run), self._states(block + 1, run).writing() as put:
            for number, place in enumerate(self._places):
                put(self._sweep.through(block, place, before.read(number)))

    def _rises(self, number: int, place: int) -> list[float]:
        """Return the loss increase of every run on a sample, and the one by rounding."""
        sweep, last = self._sweep, len(self._sweep.chain)

        def output(states: Tensor) -> Tensor:
            return sweep.output(place, states.to(sweep.dtype))

        original = self._states(last, ORIGINAL).read(number)
        reference, rises = output(original), []
        for run in range(len(self._runs)):
            try:
                with self._put(run):
                    changed = output(self._states(last, run).read(number))
            except NotFiniteError:
                rises.append(np.nan)
            else:
                rises.append(float(self._loss.rise(changed, reference, sweep.samples[place].inputs).mean()))
        if not self._half:
            return [*rises, 0.0]
        steps = random_numbers(original.shape, original, torch.Generator().manual_seed(place))
        moved = output(original * (1 + 0.25 * torch.finfo(sweep.dtype).eps * steps))
        return [*rises, float(self._loss.rise(moved, reference, sweep.samples[place].inputs).mean())]

    def _encoded(self, block: int | None) -> dict[int, Applied]:
        """Compute the options of a unit whose weights are in memory; None for everything outside the blocks."""
        sweep = self._sweep
        runs_of: dict[str, list[int]] = {}
        for run, (part, _) in enumerate(self._runs):
            if sweep.opened.block_of(part.modules[0]) == block:
                runs_of.setdefault(part.name, []).append(run)
        parts = [self._runs[runs[0]][0] for runs in runs_of.values()]
        offers = {name: [self._runs[run][1] for run in runs] for name, runs in runs_of.items()}
        found: dict[int, Applied] = {}
        inputs = inputs_of(sweep.model, sweep, block, parts, offers)
        for part, weight in zip(parts, weights_of(sweep.model, parts, *inputs), strict=True):
            for run in runs_of[part.name]:
                transform = self._runs[run][1]
                rows = functools.partial(_decoded, part, transform, transform.encode(weight))
                alone = Candidates(sweep.model, (part,), [(Keep(), transform)], rows, [0])
                found[run] = functools.partial(alone.applied, 0, 1)
        return found


def _decoded(part: Part, transform: Transform, stored: dict[str, Tensor], *_: int) -> Tensor:
    return transform.decode(stored, part.target).to(part.target.dtype)
