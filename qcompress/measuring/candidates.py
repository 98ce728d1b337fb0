"""The options of every part of a model, and the change of the weight that each one makes.

Every weight is approximated once per option; the changes of the options that are left are kept, in the weight's
dtype, for all batches.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress import layers
from qcompress.errors import ModelError
from qcompress.options import Options
from qcompress.parts import Part
from qcompress.transforms.base import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight with all its parts: one, or its blocks of output channels in order.

    Attributes:
        modules: paths of the modules that share the weight.
        parts: indices into the candidates' parts, ascending rows.
    """

    modules: tuple[str, ...]
    parts: tuple[int, ...]


class Candidates:
    """Parts, their options, and the changes these make.

    Args:
        model: the original.
        parts: of it.
        options: what is on offer.
        moments: of the inputs of the parts for which something on offer needs them, by part name.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[Part, ...],
        options: Options,
        moments: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self.parts = parts
        self._changes: dict[tuple[int, int], Tensor] = {}
        transforms, errors = [], []
        for index, part in enumerate(parts):
            rows = part.weight(model)
            if not bool(torch.isfinite(rows).all()):
                raise ModelError(f"the weight of {part.name!r} holds NaN or infinity")
            fitted = options.for_weight(Weight(rows, part.target, moments.get(part.name)))
            for option, own in enumerate(fitted[1:], start=1):
                self._changes[index, option] = own.rows.to(rows) - rows
            transforms.append(tuple(own.transform for own in fitted))
            errors += [own.error for own in fitted]
        self.transforms = tuple(transforms)
        self.errors: NDArray[np.float64] = np.array(errors)
        sizes = [len(group) for group in self.transforms]
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        by_weight: dict[tuple[str, ...], list[int]] = {}
        for index, part in enumerate(parts):
            by_weight.setdefault(part.modules, []).append(index)
        self.layers = tuple(Layer(modules=modules, parts=tuple(own)) for modules, own in by_weight.items())

    @property
    def size_bytes(self) -> NDArray[np.float64]:
        """``(V,)`` bytes of every option."""
        own = zip(self.parts, self.transforms, strict=True)
        sizes = [transform.size_bytes(part.target) for part, options in own for transform in options]
        return np.array(sizes, dtype=np.float64)

    @property
    def num_options(self) -> int:
        """V."""
        return int(self.offsets[-1])

    def change(self, part: int, option: int) -> Tensor:
        """``approximation - weight`` of the part's rows, ``(channels, per_channel)``."""
        if option == 0:
            return torch.zeros_like(self.parts[part].weight(self._model))
        return self._changes[part, option]

    def layer_change(self, layer: Layer, option: int) -> Tensor:
        """The change of the whole weight when every part takes its ``option``-th option, where it has one."""
        module = self._model.get_submodule(layer.modules[0])
        weight = layers.weight_of(module).detach()
        rows = [
            self.change(part, option)
            if option < len(self.transforms[part])
            else torch.zeros_like(self.parts[part].weight(self._model))
            for part in layer.parts
        ]
        return layers.from_rows(module, torch.cat(rows), weight.shape)

    @contextlib.contextmanager
    def applied(self, part: int, option: int) -> Iterator[None]:
        """The model with one option of one part in place; put back exactly afterwards."""
        own = self.parts[part]
        module = self._model.get_submodule(own.modules[0])
        weight = layers.weight_of(module)
        original = weight.detach().clone()
        start, stop = own.rows or (0, own.target.channels)
        rows = layers.to_rows(module, original).clone()
        rows[start:stop] += self.change(part, option)
        with torch.no_grad():
            weight.copy_(layers.from_rows(module, rows, weight.shape))
        try:
            yield
        finally:
            with torch.no_grad():
                weight.copy_(original)
