"""Products of weight gradients with the changes that options make, taken as soon as a backward pass has them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.measuring.candidates import Candidates, Layer
from qcompress.measuring.methods.calls import Call, autocast_of, response
from qcompress.model.sites import Site
from qcompress.transforms.activations import Activations


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
