"""Costs from weight gradients: one backward pass per sample, whatever the number of tokens and of options.

For a random probe ``a`` of the outputs with ``E[a·aᵀ] = H`` (for ``kl``: a label drawn from the model's own
distribution at every position, which makes it the true Fisher information; Kunstner et al., arXiv 1905.12558) the
effect of an option is, to first order in ΔW, ``⟨∂(a·output)/∂W, ΔW⟩``, and its loss increase is half the mean square of
that. A sample gives one number per option: the backward pass delivers the weight gradients layer by layer; each is
multiplied with the changes of the layer's options and released.

The costs are of second order, and estimates: their relative standard error is about ``√(2 / samples)``. That is enough
to tell where bits are needed, but not enough to tell which options interact, so there are no pair terms.

Three assumptions are checked. If samples give other outputs alone than within a batch, a batch counts as one sample. If
no gradient reaches a weight in a whole batch but the outputs change with it (``no_grad``, ``detach``, rounding, numpy),
or if the outputs of the first sample do not follow the gradient (see `gradient_check`), the options are evaluated one
by one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.measuring.candidates import Candidates, Layer
from qcompress.measuring.effects import Effects
from qcompress.measuring.methods.calls import Call, autocast_of, response
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.gradient_check import misleading
from qcompress.model import forward as forwards
from qcompress.model.samples import same_outputs
from qcompress.model.sites import Site
from qcompress.transforms.activations import Activations

MISLED = "the outputs do not follow its gradient"
UNSEEN = "no gradient reaches it, but its weight has an effect"


class WeightGradients:
    """Costs of batches from one random probe per sample.

    Args:
        direct: the model, its options, the loss and how to run a batch; tries options that no gradient reaches.
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
        """Compute the costs of the batch, without terms between parts.

        Args:
            batch: samples, each of which is run alone; a batch that cannot be split counts as one sample.
            generator: generator for the probes.
            reference: outputs of the original, if the model is not the original.
        """
        cost, num_samples = np.zeros(self._candidates.num_options), 0
        reached: set[Layer] = set()
        for sample in self._samples(batch):
            if self._check_due:
                self._check(sample)
                self._check_due = False
            with torch.enable_grad(), Gradients(self._model, self._candidates, reached) as gradients:
                output = forwards.run(self._model, sample, self._forward)
                point, stop = output.detach(), num_samples + len(output)
                wanted = None if reference is None else reference[num_samples:stop]
                probe, slope = self._loss.probe(point, sample, generator), self._loss.gradient(point, sample, wanted)
                if slope is not None:
                    cost += gradients.products(output, slope, keep=True)
                cost += 0.5 * gradients.products(output, probe, keep=False) ** 2
            num_samples = stop
        self._try_unseen(batch, reached, cost, reference)
        return Effects(cost, (), num_samples)

    def _check(self, sample: Any) -> None:
        """Note the layers whose gradient the outputs do not follow."""
        layers = [
            layer for layer in self._candidates.layers if self._candidates.parts[layer.parts[0]].name not in self.tried
        ]
        weights = [layer.site(self._model).weight for layer in layers]
        generator = torch.Generator().manual_seed(0)
        for index in misleading(lambda: forwards.run(self._model, sample, self._forward), weights, generator):
            self.tried |= {self._candidates.parts[part].name: MISLED for part in layers[index].parts}

    def _samples(self, batch: Any) -> list[Any]:
        alone = list(samples(batch))
        if self.apart is None and len(alone) > 1:
            self.apart = self._same_alone(batch, alone)
        return alone if self.apart else [batch]

    @torch.no_grad()
    def _same_alone(self, batch: Any, each: list[Any]) -> bool:
        """Whether the first and the last sample of a batch give the same outputs alone as within the batch."""
        whole = forwards.run(self._model, batch, self._forward)
        rows = len(whole) // len(each)
        if rows * len(each) != len(whole):
            return False
        for index in (0, len(each) - 1):
            try:
                alone = forwards.run(self._model, each[index], self._forward)
            except Exception:  # any error of a model that does not accept smaller batches: run whole batches
                return False
            if not same_outputs(self._model, alone, whole[index * rows : (index + 1) * rows]):
                return False
        return True

    @torch.no_grad()
    def _try_unseen(self, batch: Any, reached: set[Layer], cost: NDArray[np.float64], reference: Tensor | None) -> None:
        """Put in the true costs of the layers that affect the outputs but receive no gradient."""
        candidates = self._candidates
        names = {layer: [candidates.parts[part].name for part in layer.parts] for layer in candidates.layers}
        silent = [
            candidate
            for candidate in candidates.layers
            if candidate not in reached and names[candidate][0] not in self.tried
        ]
        if silent:
            point = forwards.run(self._model, batch, self._forward)
            if self._moves(silent, batch, point):
                for layer in silent:
                    if self._moves([layer], batch, point):
                        self.tried |= dict.fromkeys(names[layer], UNSEEN)
        parts = [
            part for layer in candidates.layers for part in layer.parts if candidates.parts[part].name in self.tried
        ]
        if parts:
            self._direct.record(batch)
        for part in parts:
            for flat, rise, _ in self._direct.changes(part, batch, reference):
                cost[flat] = rise

    def _moves(self, chosen: list[Layer], batch: Any, point: Tensor) -> bool:
        """Whether outputs change when weights are moved at random, by their own size."""
        weights = [layer.site(self._model).weight for layer in chosen]
        before = [weight.detach().clone() for weight in weights]
        generator = torch.Generator().manual_seed(0)
        try:
            for weight, original in zip(weights, before, strict=True):
                noise = torch.randn(weight.shape, generator=generator).to(original)
                weight.add_(noise * original.float().square().mean().sqrt().to(original))
            moved = forwards.run(self._model, batch, self._forward)
        finally:
            for weight, original in zip(weights, before, strict=True):
                weight.copy_(original)
        return moved.shape != point.shape or not torch.equal(moved, point)


class Gradients:
    """Context manager in which the candidates' weights receive gradients, which are multiplied and released at once.

    Layers with a nonzero gradient are added to ``reached``.
    """

    def __init__(self, model: nn.Module, candidates: Candidates, reached: set[Layer]) -> None:
        self._model, self._candidates, self._reached = model, candidates, reached
        self._sites = [layer.site(model) for layer in candidates.layers]
        self._products = np.zeros(candidates.num_options)
        self._hooks: list[Any] = []

    def __enter__(self) -> "Gradients":
        for site, layer in zip(self._sites, self._candidates.layers, strict=True):
            site.weight.requires_grad_(True)

            def multiply(weight: Tensor, site: Site = site, layer: Layer = layer) -> None:
                gradient, weight.grad = weight.grad, None
                if gradient is not None and bool(gradient.any()):
                    self._reached.add(layer)
                    self._multiply(layer, site.to_rows(gradient))

            self._hooks.append(site.weight.register_post_accumulate_grad_hook(multiply))  # type: ignore[no-untyped-call]
        for layer in self._candidates.layers:
            if rounding := self._rounding(layer):
                self._hooks += [
                    self._listen(self._model.get_submodule(path), layer, rounding) for path in layer.modules
                ]
        return self

    def _rounding(self, layer: Layer) -> list[tuple[int, Activations]]:
        """The options of a layer that round its activations, with their rounding."""
        part = layer.parts[0]
        options = range(len(self._candidates.transforms[part]))
        activations = [(option, self._candidates.activations(layer, option)) for option in options]
        return [
            (option, rounding)
            for option, rounding in activations
            if rounding is not None and option != self._candidates.standing[part]
        ]

    def _listen(self, module: nn.Module, layer: Layer, rounding: list[tuple[int, Activations]]) -> Any:
        """Multiply the gradient of every call's output with the changes that these options make to it."""

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not (isinstance(output, Tensor) and output.requires_grad):
                return
            call = Call(module, args, kwargs, output.detach().clone(), None, autocast_of(output))

            @torch.no_grad()
            def multiply(gradient: Tensor) -> None:
                for option, activations in rounding:
                    change = response(call, self._candidates.layer_change(layer, option), activations)
                    product = (gradient.float() * change.float()).sum(dtype=torch.float64)
                    self._products[self._candidates.offsets[layer.parts[0]] + option] += float(product)

            output.register_hook(multiply)  # type: ignore[no-untyped-call]

        return module.register_forward_hook(note, with_kwargs=True, prepend=True)

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for site in self._sites:
            site.weight.requires_grad_(False)
            site.weight.grad = None

    def products(self, output: Tensor, probe: Tensor, *, keep: bool) -> NDArray[np.float64]:
        """``⟨∂(probe·output)/∂W, ΔW⟩`` of every option, ``(V,)``; with ``keep`` it can be called again."""
        self._products[:] = 0.0
        if output.requires_grad:
            output.backward(probe, retain_graph=keep)  # type: ignore[no-untyped-call]
        return self._products.copy()

    @torch.no_grad()
    def _multiply(self, layer: Layer, gradient: Tensor) -> None:
        candidates = self._candidates
        for part in layer.parts:
            start, stop = candidates.parts[part].rows or (0, len(gradient))
            rows = gradient[start:stop].float().reshape(-1)
            for option in range(len(candidates.transforms[part])):
                if option != candidates.standing[part] and candidates.activations(layer, option) is None:
                    change = candidates.change(part, option).float().reshape(-1)
                    self._products[candidates.offsets[part] + option] = float(rows @ change)


def samples(batch: Any) -> Iterator[Any]:
    """Split a batch into samples, as batches of one; yields the batch itself if it cannot be split.

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
