"""A compressed model whose weights stay packed in memory, and are decoded where they are used.

`pack_` takes the dense weights out of a compressed model. Its layers then hold the codes of their record, and a forward
pass decodes them: of an Embedding the rows that are looked up, of a large Linear a block of output channels at a time,
of every other layer the weight while it runs. What always holds: what is decoded is the dense weight bit for bit, so
outputs are those of the dense model, but that blocks of a matrix product may add up in another order.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from qcompress.compressed.factored import Factored
from qcompress.compressed.record import CompressedPart, record_of, require_unchanged
from qcompress.compressed.rows import PackedRows, packed_rows
from qcompress.errors import ArtefactError, ModelError
from qcompress.model import layers
from qcompress.transforms.base import Keep
from qcompress.transforms.low_rank.factors import LowRank

Model = TypeVar("Model", bound=nn.Module)

BLOCK = 1 << 20
"""Weights of a Linear layer that are decoded at once."""


class Packed:
    """What a layer has in common with others whose weight is packed; its class is also that of the layer."""

    _rows: PackedRows
    _reader: nn.Module  # the layer that reads the weight as these rows: itself, or an unlike one that shares the weight
    _shape: torch.Size
    _device: torch.device
    _dtype: torch.dtype
    weight_is_packed = True

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Go along to another device; codes are of one dtype.

        Raises:
            ModelError: it is to be of another dtype.
        """
        moved = change(torch.empty(0, dtype=self._dtype, device=self._device))
        if moved.dtype != self._dtype:
            raise ModelError(
                f"packed weights decode to {self._dtype}, they cannot become {moved.dtype}: convert the original "
                "before it is compressed"
            )
        self._device = moved.device
        return super()._apply(change, recurse)  # type: ignore[misc,no-any-return]

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded anew every time."""
        whole = self._decoded(0, self._rows.channels)
        return layers.from_rows(self._reader, whole, self._shape)

    def _decoded(self, start: int, stop: int) -> Tensor:
        return self._rows.block(start, stop).to(self._device)


class _PackedLinear(Packed):
    """Decodes a block of output channels at a time."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as of a Linear layer)
        """``(…, in)`` → ``(…, out)``."""
        channels, features = self._shape
        step = max(8, BLOCK // features)
        blocks = []
        for start in range(0, channels, step):
            stop = min(start + step, channels)
            bias = None if self.bias is None else self.bias[start:stop]
            blocks.append(nn.functional.linear(input, self._decoded(start, stop), bias))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


class _PackedEmbedding(Packed):
    """Decodes the rows that are looked up."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as of an Embedding)
        """``(…)`` ids → ``(…, features)``."""
        words, places = torch.unique(input.cpu(), return_inverse=True)
        if len(words) and not 0 <= int(words[0]) <= int(words[-1]) < self._rows.channels:
            raise IndexError(f"ids must be from 0 to {self._rows.channels - 1}, found {words[0]} to {words[-1]}")
        return self._rows.rows(words)[places].to(self._device)


@functools.cache
def _packed_class(layer: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer with its weight packed. One that computes as PyTorch's own does it a part at a time."""
    kind: type[Packed] = Packed
    if issubclass(layer, nn.Linear) and layer.forward is nn.Linear.forward:
        kind = _PackedLinear
    elif issubclass(layer, nn.Embedding) and layer.forward is nn.Embedding.forward:
        kind = _PackedEmbedding
    return type(f"Packed{layer.__name__}", (kind, layer), {})


def pack_(model: Model) -> Model:
    """Let ``model`` hold packed codes instead of dense weights, in place, and return it; it can then only be run.

    Time: every call decodes (`benchmarks.packed` says what that costs). Weights that are kept as they are stay.

    Args:
        model: what `apply`, `compress` or `load_compressed` gave.

    Raises:
        ArtefactError: the model was not compressed, or a compressed weight was changed since.

    >>> import torch
    >>> from qcompress import compress
    >>> model, batch = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(32, 64)
    >>> small = compress(model, [batch], budget={"bytes": 0.2}, solver="greedy").model
    >>> expected = small(batch)
    >>> packed = pack_(small)
    >>> sum(parameter.numel() for parameter in packed.parameters())  # the biases
    74
    >>> torch.allclose(packed(batch), expected)
    True
    """
    record = record_of(model)
    if record is None:
        raise ArtefactError(
            f"this {type(model).__name__} carries no record of a compression: pack what apply(), compress() or "
            "load_compressed() gave"
        )
    require_unchanged(record, model)
    for modules, parts in itertools.groupby(record.parts, key=lambda item: item.part.modules):
        items = list(parts)
        if not any(item.stored for item in items):
            continue
        first = model.get_submodule(modules[0])
        if isinstance(first, Factored):
            _pack_factors(first, items[0])
        else:
            rows = _rows_of(first, items)
            for path in modules:
                _pack(model.get_submodule(path), rows, first)
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether some layer of ``model`` has its weight packed."""
    return any(isinstance(module, Packed) for module in model.modules())


def _rows_of(module: nn.Module, items: Sequence[CompressedPart]) -> PackedRows:
    """The rows of all blocks of a layer; those of a kept block are copied, for the weight goes."""
    whole = layers.to_rows(module, layers.weight_of(module).detach())
    blocks = []
    for item in items:
        start, stop = item.part.rows or (0, len(whole))
        stored: dict[str, Tensor] = item.stored or {"rows": whole[start:stop].cpu().clone()}
        blocks.append((item.transform, stored, item.part.target))
    return packed_rows(blocks)


def _pack_factors(module: Factored, item: CompressedPart) -> None:
    """Pack the members of a factored layer."""
    assert isinstance(item.transform, LowRank)  # noqa: S101
    if isinstance(item.transform.then, Keep):
        return
    for name, target in item.transform.factor_targets(item.part.target).items():
        start = f"{name}."
        stored = {key.removeprefix(start): own for key, own in item.stored.items() if key.startswith(start)}
        factor = module.get_submodule(name)
        _pack(factor, packed_rows([(item.transform.then, stored, target)]), factor)


def _pack(module: nn.Module, rows: PackedRows, reader: nn.Module) -> None:
    weight = layers.weight_of(module)
    del module._parameters["weight"]
    kind: type[nn.Module] = type(module)
    module.__class__ = _packed_class(kind)  # type: ignore[arg-type]
    vars(module).update(_rows=rows, _reader=reader, _shape=weight.shape, _device=weight.device, _dtype=weight.dtype)
