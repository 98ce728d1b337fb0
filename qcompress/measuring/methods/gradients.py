"""Products of weight gradients with the changes that options make.

If the changes fit into the given memory, they are computed once and kept. Otherwise as many samples' gradients as fit
are collected before they are multiplied, so that each change is computed once for all of them. Of a gradient that is
zero in most rows, such as an embedding's, only the other rows are kept. Products are computed in the same chunks of a
layer in all cases, so that the numbers do not depend on the memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.function_transforms import in_transform
from qcompress.measuring.candidates import Candidates, Layer
from qcompress.measuring.memory import MemoryTrimmer, room_on
from qcompress.measuring.methods.calls import Call, autocast_of, response
from qcompress.model.forward import device_of
from qcompress.model.sites import Site
from qcompress.transforms.activations import Activations

CHUNK = 1 << 16
"""Weights that are multiplied at a time, which stay in the processor's cache for all samples."""

CHUNK_THERE = 1 << 24
"""The same on an accelerator, where few large operations are fast."""

STACKED = 1 << 26
"""Bytes of the changes of several options that are multiplied together."""

SPARSE = 4
"""A gradient is held by rows if less than one in so many is not zero."""

NO_GRADIENT = "where the rounding of its activations has no gradient: measure with method='fisher' or 'direct'"


@dataclass(slots=True)
class _Held:
    """Gradient of a layer for one column, ``(rows, weights per row)`` as one row.

    Attributes:
        column: the column.
        values: the gradient, flat.
        rows: indices of the rows in ``values``, in order; None for all.
        width: weights in a row.
    """

    column: int
    values: Tensor
    rows: Tensor | None
    width: int

    def part(self, start: int, stop: int) -> "tuple[Tensor | None, Tensor]":
        """Return which of the rows from ``start`` to ``stop`` are held (None for all), and their values, flat."""
        if self.rows is None:
            return None, self.values[start * self.width : stop * self.width]
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop], device=self.rows.device)).tolist()
        return self.rows[first:last] - start, self.values[first * self.width : last * self.width]


class Gradients:
    """Let the candidates' weights receive gradients inside the block, which are multiplied and released.

    Args:
        model: the model.
        candidates: its options.
        room: bytes of changes and gradients that may be held; by default `room_on` the model's device.

    Attributes:
        reached: for every column, the layers with a gradient that is not zero.
    """

    def __init__(self, model: nn.Module, candidates: Candidates, room: int | None = None) -> None:
        room = room_on(device_of(model)) if room is None else room
        self._model, self._candidates = model, candidates
        self._stacks: dict[tuple[int, int], Tensor] | None = {} if candidates.decoded_bytes <= room else None
        self._room = room if self._stacks is None else room - candidates.decoded_bytes
        self._sites = [layer.site(model) for layer in candidates.layers]
        self._columns: list[NDArray[np.float64]] = []
        self._held: dict[Layer, list[_Held]] = {layer: [] for layer in candidates.layers}
        self._held_bytes = 0
        self._hooks: list[Any] = []
        self._adding = False
        self._trimmer = MemoryTrimmer()
        self.reached: list[set[Layer]] = []

    def __enter__(self) -> "Gradients":
        for site, layer in zip(self._sites, self._candidates.layers, strict=True):
            site.weight.requires_grad_(True)
            self._hooks.append(site.weight.register_post_accumulate_grad_hook(self._taking(site, layer)))  # type: ignore[no-untyped-call]
        for layer in self._candidates.layers:
            if rounding := self._rounding(layer):
                self._hooks += [
                    self._listen(self._model.get_submodule(path), layer, rounding) for path in layer.modules
                ]
        return self

    def _taking(self, site: Site, layer: Layer) -> Callable[[Tensor], None]:
        """Return a hook that takes the gradient away from a weight."""

        @torch.no_grad()
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is None:
                return
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            self._trimmer.after(gradient.nbytes)  # memory of layers that the backward pass is done with
            rows = site.to_rows(gradient).float()
            touched = torch.linalg.vector_norm(rows, ord=1, dim=1) != 0  # a sum of squares could underflow
            count = int(touched.sum())
            if not count:
                return
            index = touched.nonzero().flatten() if count * SPARSE < len(rows) else None
            values = (rows if index is None else rows[index]).reshape(-1)
            self.reached[-1].add(layer)
            if self._held_bytes and self._held_bytes + values.nbytes > self._room:
                self._multiply()
            self._held[layer].append(_Held(len(self._columns) - 1, values, index, rows.shape[1]))
            self._held_bytes += values.nbytes

        return take

    def _rounding(self, layer: Layer) -> list[tuple[int, Activations]]:
        """Return the options of a layer that round its activations, with their rounding."""
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
            if torch.is_grad_enabled() and in_transform():
                raise ModelError(
                    f"{layer.modules[0]!r} is called inside a function transform (torch.func), {NO_GRADIENT}"
                )
            if not (isinstance(output, Tensor) and output.requires_grad):
                return
            call = Call(module, args, kwargs, output.detach().clone(), None, autocast_of(output))

            @torch.no_grad()
            def multiply(gradient: Tensor) -> None:
                if not self._adding:
                    raise ModelError(
                        f"the model itself computes a gradient through {layer.modules[0]!r}, {NO_GRADIENT}"
                    )
                for option, activations in rounding:
                    change = response(call, self._candidates.layer_change(layer, option), activations)
                    product = (gradient.float() * change.float()).sum(dtype=torch.float64)
                    self._columns[-1][self._candidates.offsets[layer.parts[0]] + option] += float(product)

            output.register_hook(multiply)  # type: ignore[no-untyped-call]

        return module.register_forward_hook(note, with_kwargs=True, prepend=True)

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for site in self._sites:
            site.weight.requires_grad_(False)
            site.weight.grad = None

    def add(self, output: Tensor, probe: Tensor, *, keep: bool = False) -> None:
        """Add a column: the effects on ``probe·output``. With ``keep`` the output can be used again."""
        self._columns.append(np.zeros(self._candidates.num_options))
        self.reached.append(set())
        if output.requires_grad:
            self._adding = True
            try:
                output.backward(probe, retain_graph=keep)  # type: ignore[no-untyped-call]
            finally:
                self._adding = False

    def effects(self) -> NDArray[np.float64]:
        """``⟨∂(probe·output)/∂W, ΔW⟩`` of every option and column so far, ``(V, columns)``."""
        self._multiply()
        if not self._columns:
            return np.zeros((self._candidates.num_options, 0))
        return np.stack(self._columns, axis=1)

    @torch.no_grad()
    def _multiply(self) -> None:
        """Multiply all held gradients and release them."""
        for layer, held in self._held.items():
            if held:
                for part in layer.parts:
                    self._multiply_part(layer, part, held)
                held.clear()
        self._held_bytes = 0

    def _multiply_part(self, layer: Layer, part: int, held: list[_Held]) -> None:
        candidates = self._candidates
        measured = candidates.parts[part]
        start, stop = measured.rows or (0, measured.target.channels)
        options = [
            option
            for option in range(len(candidates.transforms[part]))
            if option != candidates.standing[part] and candidates.activations(layer, option) is None
        ]
        slices = [gradient.part(start, stop) for gradient in held]
        together = max(1, STACKED // (4 * (stop - start) * held[0].width))
        for first in range(0, len(options), together):
            some = options[first : first + together]
            stacks = {} if self._stacks is None else self._stacks
            if (part, first) not in stacks:
                changes = [candidates.change(part, option) for option in some]
                stacks[part, first] = changes[0][None] if len(some) == 1 else torch.stack(changes)
            for gradient, products in zip(held, _products(stacks[part, first], slices), strict=True):
                column = self._columns[gradient.column]
                column[[candidates.offsets[part] + option for option in some]] += products


def _products(changes: Tensor, slices: list[tuple[Tensor | None, Tensor]]) -> NDArray[np.float64]:
    """Multiply changes ``(options, rows, weights per row)`` with gradients of all or some rows, one row each."""
    flat = changes.flatten(1)
    sums = torch.zeros(len(slices), len(changes), dtype=torch.float64, device=changes.device)
    size = CHUNK if changes.device.type == "cpu" else CHUNK_THERE
    for start in range(0, flat.shape[1], size):
        chunk = flat[:, start : start + size].float()
        for number, (rows, values) in enumerate(slices):
            if rows is None:
                sums[number] += torch.mv(chunk, values[start : start + size])
    for number, (rows, values) in enumerate(slices):
        if rows is not None:
            sums[number] += torch.mv(changes[:, rows].flatten(1).float(), values)
    return sums.cpu().numpy()
