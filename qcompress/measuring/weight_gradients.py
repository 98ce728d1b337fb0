"""Costs from weight gradients: one backward pass a sample, whatever the number of tokens and of options.

For a random probe ``a`` of the outputs with ``E[a·aᵀ] = H`` (for ``kl``: a label drawn from the model's own
distribution at every position, which makes it the true Fisher information; Kunstner et al., arXiv 1905.12558) the
effect of an option is ``⟨∂(a·output)/∂W, ΔW⟩``, to first order in ΔW, and its loss increase half the mean square of
that. A sample gives one number an option: the backward pass hands out weight gradients a layer at a time, which are
multiplied with the changes of the layer's options and let go.

The costs are of the second order, and estimates: their relative standard error is about ``√(2 / samples)``. That is
enough to tell where bits are needed; it is not enough to tell which options go together, so there are no pair terms.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.measuring.candidates import Candidates, Layer
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.losses import Loss


class WeightGradients:
    """Costs of batches from one random probe a sample.

    Args:
        model: with the candidates' parts.
        candidates: options.
        loss: what they are measured by.
        forward: how to run a batch.
    """

    def __init__(self, model: nn.Module, candidates: Candidates, loss: Loss, forward: forwards.Forward | None) -> None:
        self._model, self._candidates, self._loss, self._forward = model, candidates, loss, forward
        self.tried: dict[str, str] = {}  # a weight's own gradient sees every use of it: nothing needs trying

    def batch_effects(
        self, batch: Any, generator: torch.Generator, reference: Tensor | None = None
    ) -> tuple[NDArray[np.float64], Iterable[NDArray[np.floating]], int]:
        """Costs ``(V,)`` summed over the batch, no effects, and the number of samples.

        Args:
            batch: samples, each of which is run alone; where it cannot be taken apart, all are one sample of the costs.
            generator: of the probes.
            reference: outputs of the original, where the model is not the original.
        """
        cost, num_samples = np.zeros(self._candidates.num_options), 0
        for sample in samples(batch):
            with torch.enable_grad(), _Gradients(self._model, self._candidates) as gradients:
                output = forwards.run(self._model, sample, self._forward)
                point, stop = output.detach(), num_samples + len(output)
                wanted = None if reference is None else reference[num_samples:stop]
                probe, slope = self._loss.probe(point, sample, generator), self._loss.gradient(point, sample, wanted)
                if slope is not None:
                    cost += gradients.products(output, slope, keep=True)
                cost += 0.5 * gradients.products(output, probe, keep=False) ** 2
            num_samples = stop
        return cost, (), num_samples


class _Gradients:
    """While open: weights of the candidates that ask for gradients, which are multiplied as soon as they are there."""

    def __init__(self, model: nn.Module, candidates: Candidates) -> None:
        self._candidates = candidates
        self._weights = [layers.weight_of(model.get_submodule(layer.modules[0])) for layer in candidates.layers]
        self._modules = [model.get_submodule(layer.modules[0]) for layer in candidates.layers]
        self._products = np.zeros(candidates.num_options)
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Gradients":
        for weight, module, layer in zip(self._weights, self._modules, self._candidates.layers, strict=True):
            weight.requires_grad_(True)

            def multiply(weight: Tensor, module: nn.Module = module, layer: Layer = layer) -> None:
                gradient, weight.grad = weight.grad, None
                if gradient is not None:
                    self._multiply(layer, layers.to_rows(module, gradient))

            self._hooks.append(weight.register_post_accumulate_grad_hook(multiply))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None

    def products(self, output: Tensor, probe: Tensor, *, keep: bool) -> NDArray[np.float64]:
        """``⟨∂(probe·output)/∂W, ΔW⟩`` of every option ``(V,)``; with ``keep`` it can be asked for again."""
        self._products[:] = 0.0
        output.backward(probe, retain_graph=keep)  # type: ignore[no-untyped-call]
        return self._products.copy()

    @torch.no_grad()
    def _multiply(self, layer: Layer, gradient: Tensor) -> None:
        candidates = self._candidates
        for part in layer.parts:
            start, stop = candidates.parts[part].rows or (0, len(gradient))
            rows = gradient[start:stop].float().reshape(-1)
            for option in range(len(candidates.transforms[part])):
                if option != candidates.standing[part]:
                    change = candidates.change(part, option).float().reshape(-1)
                    self._products[candidates.offsets[part] + option] = float(rows @ change)


def samples(batch: Any) -> Iterator[Any]:
    """The samples of a batch as batches of one; the batch itself where it cannot be told what belongs to a sample.

    >>> [sample["x"].tolist() for sample in samples({"x": torch.tensor([[1], [2]]), "flag": True})]
    [[[1]], [[2]]]
    """
    lengths = {len(value) for value in _tensors(batch)}
    if len(lengths) != 1:
        yield batch
        return
    for index in range(lengths.pop()):
        yield _taken(batch, slice(index, index + 1))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.ndim else []
    values: Iterable[Any] = (
        batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return [tensor for value in values for tensor in _tensors(value)]


def _taken(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim else batch
    if isinstance(batch, dict):
        return {key: _taken(value, part) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_taken(value, part) for value in batch]
    return batch
