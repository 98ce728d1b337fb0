"""Costs from weight gradients: one backward pass per sample, whatever the number of tokens and of options.

For a random probe ``a`` of the outputs with ``E[a·aᵀ] = H`` (for ``kl``: the score of a drawn label at every position,
which makes it the true Fisher information, see `qcompress.model.scores`; Kunstner et al., arXiv 1905.12558) the effect
of an option is, to first order in ΔW, ``⟨∂(a·output)/∂W, ΔW⟩``, and its loss increase is half the mean square of that.
A sample gives one number per option: the backward pass delivers the weight gradients layer by layer; each is multiplied
with the changes of the layer's options and released (see `gradients`).

The costs are second-order estimates with a relative standard error of about ``√(2 / samples)``. The samples are the
columns of the factor for the pair terms, which are as rough.

If the decoded options do not fit into the cache, they are all decoded again for every sample;
`qcompress.measuring.streamed.together` avoids that for models of repeated blocks.

Three assumptions are checked. If samples have other outputs or losses alone than within a batch, a batch counts as one
sample. If no gradient reaches a weight in a whole batch but the outputs change with it (``no_grad``, ``detach``,
rounding, numpy), or if the outputs of the first sample, at its real positions, do not follow the gradient (see
`gradient_check`), the options are evaluated one by one.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.errors import NotFiniteError
from qcompress.measuring.candidates import Layer
from qcompress.measuring.effects import Effects
from qcompress.measuring.memory import return_free_memory
from qcompress.measuring.methods import evidence
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.gradient_check import misleading, widened
from qcompress.measuring.methods.gradients import Gradients
from qcompress.model import forward as forwards
from qcompress.model.alone import same_losses, same_outputs
from qcompress.model.batches import as_float32, samples
from qcompress.model.padding import at_real_positions
from qcompress.model.scores import random_numbers

SEVERAL, FEW_NUMBERS = 8, 1 << 20
"""Number of samples that show whether what is rounded follows a gradient, if the outputs of one have so few numbers."""


class WeightGradients:
    """Costs of batches from one random probe per sample.

    Args:
        direct: evaluator of options that no gradient reaches; also provides the model, its options, the loss and the
            forward.
        tried: names of parts to evaluate directly from the start, and why.
        apart: whether samples give the same outputs alone; None if not yet known.
        check: whether to check on the first sample that outputs follow the gradients.

    Attributes:
        tried, apart: the arguments, updated by what was found since.
    """

    def __init__(
        self,
        direct: Direct,
        tried: Mapping[str, str] | None = None,
        apart: bool | None = None,
        *,
        check: bool = True,
    ) -> None:
        self._direct, self._model, self._candidates = direct, direct.model, direct.candidates
        self._loss, self._forward = direct.loss, direct.forward
        self.apart = apart
        self._check_due = check
        self.tried: dict[str, str] = dict(tried or {})

    def batch_effects(self, batch: Any, generator: torch.Generator, reference: Tensor | None = None) -> Effects:
        """Compute the costs and effects of the batch.

        Args:
            batch: samples, each of which is run alone; a batch that cannot be split counts as one sample.
            generator: generator for the probes.
            reference: outputs of the original, if the model is not the original.
        """
        alone = self._samples(batch)
        self._check(alone)
        if self._all_tried:
            return self._without_gradients(batch, len(alone), reference)
        slopes, num_samples = [], 0
        with Gradients(self._model, self._candidates) as gradients:
            for sample in alone:
                with torch.enable_grad():
                    output = forwards.run(self._model, sample, self._forward)
                point, stop = output.detach(), num_samples + len(output)
                wanted = None if reference is None else reference[num_samples:stop]
                probe, slope = self._loss.probe(point, sample, generator), self._loss.gradient(point, sample, wanted)
                slopes.append(slope is not None)
                if slope is not None:
                    gradients.add(output, slope, keep=True)
                gradients.add(output, probe)
                num_samples = stop
            columns = gradients.effects()
        names = {self._candidates.parts[part].name for layer in set().union(*gradients.reached) for part in layer.parts}
        ends = np.cumsum([1 + sloping for sloping in slopes]) - 1
        effects, firsts = columns[:, ends], np.where(slopes, columns[:, ends - 1], 0.0)
        return self._completed(batch, effects, firsts + 0.5 * effects**2, num_samples, names, reference)

    @property
    def _all_tried(self) -> bool:
        return all(part.name in self.tried for part in self._candidates.parts)

    @torch.no_grad()
    def _without_gradients(self, batch: Any, num_columns: int, reference: Tensor | None) -> Effects:
        num_samples = len(forwards.run(self._model, batch, self._forward))
        nothing = np.zeros((self._candidates.num_options, num_columns))
        return self._completed(batch, nothing, nothing.copy(), num_samples, set(), reference)

    def _completed(
        self,
        batch: Any,
        effects: NDArray[np.float64],
        costs: NDArray[np.float64],
        num_samples: int,
        reached: set[str],
        reference: Tensor | None,
    ) -> Effects:
        """Sum up effects and costs ``(V, samples)``.

        Parts that affect the outputs but receive no gradient get their true costs, and no pair terms.
        """
        cost, squares = costs.sum(axis=1), np.square(costs).sum(axis=1)
        for flat, rises in self._unseen(batch, reached, reference):
            by_column = rises.reshape(effects.shape[1], -1).sum(axis=1)
            cost[flat], squares[flat], effects[flat] = rises.sum(), np.square(by_column).sum(), 0.0
        return Effects(cost, [effects], num_samples, cost_squares=squares)

    def _check(self, alone: Sequence[Any]) -> None:
        """Note the layers whose gradient the outputs of the first sample do not follow, the first time only."""
        if not self._check_due:
            return
        self._check_due = False
        layers = [
            layer for layer in self._candidates.layers if self._candidates.parts[layer.parts[0]].name not in self.tried
        ]
        weights = [layer.site(self._model).weight for layer in layers]
        generator = torch.Generator().manual_seed(0)
        with widened(self._model) as wide:
            given = [as_float32(sample) if wide else sample for sample in alone[:SEVERAL]]

            def outputs(samples: Sequence[Any]) -> Tensor:
                each: list[Tensor] = []
                for own in samples:
                    each.append(at_real_positions(own, forwards.run(self._model, own, self._forward)))
                    if each[0].numel() > FEW_NUMBERS:
                        break
                return each[0] if len(each) == 1 else torch.cat([output.flatten() for output in each])

            try:
                wrong = misleading(partial(outputs, given[:1]), weights, generator, partial(outputs, given))
            except Exception as error:
                if forwards.is_out_of_memory(error) or not (wide or isinstance(error, RuntimeError)):
                    raise
                wrong = []
                if self._runs(given[0], wide=wide):
                    reason = evidence.without_gradients(error)
                    self.tried |= {part.name: reason for part in self._candidates.parts}
        return_free_memory()
        for index in wrong:
            self.tried |= {self._candidates.parts[part].name: evidence.MISLED for part in layers[index].parts}

    @torch.no_grad()
    def _runs(self, sample: Any, *, wide: bool) -> bool:
        """Whether the model runs without gradients; if not ``wide``, an error that it ends in is raised.

        A model in half precision whose code asks for it does not run in float32, in which it is checked.
        """
        try:
            forwards.run(self._model, sample, self._forward)
        except Exception as error:
            if not wide or forwards.is_out_of_memory(error):
                raise
            return False
        return True

    def _samples(self, batch: Any) -> list[Any]:
        alone = list(samples(batch))
        if self.apart is None and len(alone) > 1:
            self.apart = self._same_alone(batch, alone)
        return alone if self.apart else [batch]

    @torch.no_grad()
    def _same_alone(self, batch: Any, each: list[Any]) -> bool:
        """Whether the first and the last sample of a batch have the same outputs and losses alone as within it."""
        whole = forwards.run(self._model, batch, self._forward)
        rows = len(whole) // len(each)
        if rows * len(each) != len(whole):
            return False
        for index in (0, len(each) - 1):
            try:
                alone = forwards.run(self._model, each[index], self._forward)
            except Exception:  # any error of a model that does not accept smaller batches: run whole batches
                return False
            own = slice(index * rows, (index + 1) * rows)
            if not same_outputs(self._model, alone, whole[own]):
                return False
            if not same_losses(self._model, self._loss, (each[index], alone), (batch, whole), own):
                return False
        return True

    @torch.no_grad()
    def _unseen(self, batch: Any, reached: set[str], reference: Tensor | None) -> list[tuple[int, NDArray[np.float64]]]:
        """Evaluate the options of layers that affect the outputs but receive no gradient: flat index and true costs."""
        candidates = self._candidates
        names = {layer: [candidates.parts[part].name for part in layer.parts] for layer in candidates.layers}
        known = {*reached, *self.tried}
        silent = [layer for layer in candidates.layers if not known.intersection(names[layer])]
        if silent:
            point = forwards.run(self._model, batch, self._forward)
            if self._moves(silent, batch, point):
                for layer in silent:
                    if self._moves([layer], batch, point):
                        self.tried |= dict.fromkeys(names[layer], evidence.UNSEEN)
        parts = [
            part for layer in candidates.layers for part in layer.parts if candidates.parts[part].name in self.tried
        ]
        if parts:
            self._direct.record(batch)
        return [(flat, rises) for part in parts for flat, rises, _ in self._direct.changes(part, batch, reference)]

    def _moves(self, chosen: list[Layer], batch: Any, point: Tensor) -> bool:
        """Whether outputs change when weights are moved at random, by their own size."""
        weights = [layer.site(self._model).weight for layer in chosen]
        before = [weight.detach().clone() for weight in weights]
        generator = torch.Generator().manual_seed(0)
        try:
            for weight, original in zip(weights, before, strict=True):
                noise = random_numbers(weight.shape, original, generator)
                weight.add_(noise * original.float().square().mean().sqrt().to(original))
            moved = forwards.run(self._model, batch, self._forward)
        except NotFiniteError:
            return True
        finally:
            for weight, original in zip(weights, before, strict=True):
                weight.copy_(original)
        return moved.shape != point.shape or not torch.equal(moved, point)
