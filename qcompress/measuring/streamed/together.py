"""``method="sampled"`` for models of repeated blocks in memory, whose options do not fit decoded into memory.

The pass of every sample would decode all options. Instead, samples pass through the model together, block by block: a
forward pass stores the inputs of each block, and a backward pass runs each block again
(`qcompress.measuring.streamed.effects`). That is one more forward pass, but every option is decoded once, and the
numbers are the same. Whether the blocks are a chain that passes on all gradients is checked on one sample, by products
with its gradients from a pass of the whole model.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import ChainError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.effects import Effects
from qcompress.measuring.memory import HELD, return_free_memory
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.gradients import Gradients
from qcompress.measuring.methods.weight_gradients import WeightGradients
from qcompress.measuring.streamed.effects import StreamedEffects, effects_of_parts, probes
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.blocks import Blocks, blocks_of
from qcompress.model.chain import without_cache
from qcompress.model.losses import CallableLoss
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep

HELD_BYTES = HELD // 2
"""Bytes of gradients that are held until options are decoded for them, whatever the number of samples."""

ROUND_BYTES = 1 << 30
"""Bytes of hidden states that are stored on disk at a time."""

SAME = 1e-3
"""Relative difference from the effects of a pass of the whole model that rounding may explain."""


class TogetherGradients(WeightGradients):
    """Costs of batches as `WeightGradients` gives them; samples pass through the blocks together if that saves time.

    Args:
        direct: same as in `WeightGradients`.
        tried: same as in `WeightGradients`.
        apart: same as in `WeightGradients`.
        together: number of samples that pass through the blocks together, 0 for none; None if not yet known.
        check: same as in `WeightGradients`.

    Attributes:
        together: the argument, updated by what was found since.
    """

    def __init__(
        self,
        direct: Direct,
        tried: Mapping[str, str] | None = None,
        apart: bool | None = None,
        together: int | None = None,
        *,
        check: bool = True,
    ) -> None:
        super().__init__(direct, tried, apart, check=check)
        self.together = together

    def batch_effects(self, batch: Any, generator: torch.Generator, reference: Tensor | None = None) -> Effects:
        """Compute the costs and effects of the batch, see `WeightGradients.batch_effects`."""
        alone = self._samples(batch)
        self._check(alone)
        if self.together is None:
            wanted = not self._all_tried and self.apart is not False and reference is None and self._saves_time()
            self.together = self._how_many(alone[0], generator) if wanted else 0
        if not self.together or self.apart is False or reference is not None:
            return super().batch_effects(batch, generator, reference)
        return self.effects_together([batch], [generator])[0]

    def effects_together(self, batches: Sequence[Any], generators: Sequence[torch.Generator]) -> list[Effects]:
        """Compute `batch_effects` of several batches, whose samples pass through the blocks together."""
        counts = [len(self._samples(batch)) for batch in batches]
        if self.apart is False:
            return [self.batch_effects(*given) for given in zip(batches, generators, strict=True)]
        before = [generator.get_state() for generator in generators]
        try:
            columns, sizes, reached = effects_by_block(self._direct, batches, generators)
        except ChainError:  # for some of these samples
            self.together = 0
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            return [self.batch_effects(*given) for given in zip(batches, generators, strict=True)]
        completed, start = [], 0
        for batch, count in zip(batches, counts, strict=True):
            batch_columns = slice(start, start := start + count)
            effects, names = columns[:, batch_columns], set().union(*reached[batch_columns])
            completed.append(self._completed(batch, effects, 0.5 * effects**2, sum(sizes[batch_columns]), names, None))
        return completed

    def _saves_time(self) -> bool:
        candidates = self._candidates
        rounding = any(option.activations is not None for options in candidates.transforms for option in options)
        on_gpu = any(weight.is_cuda for weight in self._model.parameters())
        fits = candidates.decoded_bytes <= HELD
        return not (rounding or on_gpu or fits or isinstance(self._loss, CallableLoss))

    def _how_many(self, sample: Any, generator: torch.Generator) -> int:
        """Return how many samples may pass through the blocks together; 0 if the blocks are not a chain."""
        first, second = (torch.Generator().set_state(generator.get_state()) for _ in range(2))
        direct = Direct(self._model, _shifted(self._candidates, self._model), self._loss, self._forward)
        with Gradients(self._model, direct.candidates, room=0) as gradients:
            with torch.enable_grad():
                output = forwards.run(self._model, sample, self._forward)
            gradients.add(output, self._loss.probe(output.detach(), sample, first))
            expected = gradients.effects()[:, 0]
        del output
        return_free_memory()
        try:
            columns, _, _ = effects_by_block(direct, [sample], [second])
            with _sweep(direct, [sample]) as sweep:
                size_bytes = sweep.shapes[0].numel() * sweep.dtype.itemsize * (len(sweep.chain) + 1)
        except Exception:  # any error of a model whose blocks cannot be run on their own: samples pass through it alone
            return 0
        close = np.abs(columns[:, 0] - expected) <= SAME * (np.abs(expected) + np.abs(expected).max())
        return max(1, ROUND_BYTES // size_bytes) if columns.shape[1] == 1 and bool(close.all()) else 0


def effects_by_block(
    direct: Direct, batches: Sequence[Any], generators: Sequence[torch.Generator]
) -> tuple[NDArray[np.float64], list[int], list[set[str]]]:
    """Return effects ``(V, samples)``, output rows of each sample, and names of the parts that gradients reached in it.

    Args:
        direct: the model, whose blocks are a chain, its options, the loss and how to run a batch.
        batches: batches whose samples give the same outputs alone.
        generators: generators for the probes of each batch.
    """
    candidates = direct.candidates
    places = {part.name: index for index, part in enumerate(candidates.parts)}

    def work_out(parts: Sequence[Part], block: int | None) -> tuple[Candidates, NDArray[np.float64]]:  # noqa: ARG001
        unit = candidates.some([places[part.name] for part in parts])
        return unit, np.zeros(unit.num_options)

    with _sweep(direct, batches) as sweep:
        probe = probes(sweep, direct.loss, lambda number: generators[number])
        streamed = StreamedEffects(sweep, candidates.parts, work_out, [probe], HELD_BYTES, check=False)
        for _ in sweep.forward():
            pass
        effects = effects_of_parts(streamed.units())
        columns = np.concatenate([effects[part.name] for part in candidates.parts])
        return columns, sweep.sizes, streamed.reached


def _shifted(candidates: Candidates, model: nn.Module) -> Candidates:
    """Return candidates whose only option moves the values of every weight by one place."""

    def rows(part: int, _: int) -> Tensor:
        return candidates.parts[part].weight(model).roll(1)

    parts = candidates.parts
    return Candidates(model, parts, [(Keep(), Keep())] * len(parts), rows, [0] * len(parts), overwritable=True)


@contextmanager
def _sweep(direct: Direct, batches: Sequence[Any]) -> Iterator[BlockSweep]:
    model = direct.model
    with tempfile.TemporaryDirectory(prefix="qcompress.") as folder, without_cache(model):
        yield BlockSweep(model, Blocks(model, blocks_of(model)), batches, direct.forward, Path(folder))
