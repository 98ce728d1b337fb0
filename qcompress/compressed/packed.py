"""Packed models: a compressed model whose weights stay packed in memory and are decoded on use.

`pack_` removes the dense weights from a compressed model. Its layers then hold the codes of their record, and a forward
pass decodes them: the rows looked up by an Embedding, a block of output channels at a time in a large Linear layer, and
the whole weight in any other layer. The decoded weight equals the dense weight bit for bit, so the outputs are those of
the dense model, except that blocks of a matrix product may be summed in another order.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from qcompress.compressed.factored import Factored
from qcompress.compressed.record import CompressedPart, record_of, require_unchanged
from qcompress.compressed.rows import PackedRows, packed_rows
from qcompress.errors import ArtefactError, ModelError
from qcompress.model.opened import require_in_memory
from qcompress.model.sites import WEIGHT, Site
from qcompress.transforms.base import Keep
from qcompress.transforms.low_rank.factors import LowRank

Model = TypeVar("Model", bound=nn.Module)

BLOCK = 1 << 20
"""Maximum number of weights of a Linear layer that are decoded at once."""


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    """A packed weight.

    Attributes:
        rows: decoder of its rows.
        restore: rows → the weight in its shape; if unlike layers share the weight, as the first one reads it.
        shape, dtype, device: shape, type and device of the weight.
    """

    rows: PackedRows
    restore: Callable[[Tensor], Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def moved(self, change: Callable[[Tensor], Tensor]) -> "_Codes":
        """Return the codes for the device to which ``change`` moves tensors."""
        moved = change(torch.empty(0, dtype=self.dtype, device=self.device))
        if moved.dtype != self.dtype:
            raise ModelError(
                f"packed weights decode to {self.dtype} and cannot be converted to {moved.dtype}: convert the original "
                "before compressing it"
            )
        return replace(self, device=moved.device)

    def decoded(self, start: int, stop: int) -> Tensor:
        return self.rows.block(start, stop).to(self.device)

    def dense(self) -> Tensor:
        return self.restore(self.decoded(0, self.rows.channels))


class Packed:
    """Common base of modules with packed weights, combined with the class of the module."""

    _packed: dict[str, _Codes]  # by name of the parameter
    _unpacked: type[nn.Module]
    weight_is_packed = True

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device; the dtype of codes is fixed.

        Raises:
            ModelError: another dtype is requested.
        """
        self._packed = {name: codes.moved(change) for name, codes in self._packed.items()}
        return super()._apply(change, recurse)  # type: ignore[misc,no-any-return]


class _PackedLinear(Packed):
    """A Linear layer that decodes a block of output channels at a time."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (name in nn.Linear)
        """``(…, in)`` → ``(…, out)``."""
        codes = self._packed[WEIGHT]
        channels, features = codes.shape
        step = max(8, BLOCK // features)
        blocks = []
        for start in range(0, channels, step):
            stop = min(start + step, channels)
            bias = None if self.bias is None else self.bias[start:stop]
            blocks.append(nn.functional.linear(input, codes.decoded(start, stop), bias))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)


class _PackedEmbedding(Packed):
    """An Embedding that decodes the rows that are looked up."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (name in nn.Embedding)
        """``(…)`` ids → ``(…, features)``."""
        codes, channels = self._packed[WEIGHT], self._packed[WEIGHT].rows.channels
        words, places = torch.unique(input.cpu(), return_inverse=True)
        if len(words) and not 0 <= int(words[0]) <= int(words[-1]) < channels:
            raise IndexError(f"ids must be from 0 to {channels - 1}, found {words[0]} to {words[-1]}")
        return codes.rows.rows(words)[places].to(codes.device)


@functools.cache
def _packed_class(layer: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """Return the class of a module with packed parameters; those that run like PyTorch's decode a part at a time."""
    kind: type[Packed] = Packed
    if WEIGHT in parameters and issubclass(layer, nn.Linear) and layer.forward is nn.Linear.forward:
        kind = _PackedLinear
    elif WEIGHT in parameters and issubclass(layer, nn.Embedding) and layer.forward is nn.Embedding.forward:
        kind = _PackedEmbedding
    content = {"_unpacked": layer, **{name: _decoding(name) for name in parameters}}
    return type(f"Packed{layer.__name__}", (kind, layer), content)


def _decoding(parameter: str) -> property:
    """Return a property for the dense parameter, which is decoded on every access and cannot be set."""

    def refuse(self: Packed, value: object) -> None:  # noqa: ARG001
        raise ModelError(
            f"the {parameter} of this {type(self).__name__} is packed, so that neither functional_call nor anything "
            "else can set it: load the model without packed=True"
        )

    return property(lambda self: self._packed[parameter].dense(), refuse)


def pack_(model: Model) -> Model:
    """Replace the dense weights of ``model`` by packed codes, in place, and return it; it can then only be run.

    Every call decodes the weights, which takes time (see `benchmarks.packed`). Kept weights remain dense, and so do
    those of recurrent layers, which PyTorch runs from a separate list.

    Args:
        model: model returned by `apply`, `compress` or `load_compressed`.

    Raises:
        ArtefactError: the model was not compressed, or a compressed weight has changed since.

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
    require_in_memory(model, "pack_", "export() writes its packed weights")
    record = record_of(model)
    if record is None:
        raise ArtefactError(
            f"this {type(model).__name__} carries no record of a compression: pack a model returned by apply(), "
            "compress() or load_compressed()"
        )
    if is_packed(model):
        raise ArtefactError("the weights of this model are packed already")
    require_unchanged(record, model)
    for _, parts in itertools.groupby(record.parts, key=lambda item: item.part.path):
        items = list(parts)
        site = items[0].part.site(model)
        if not any(item.stored for item in items) or isinstance(site.module, nn.RNNBase):
            continue
        if isinstance(site.module, Factored):
            _pack_factors(site.module, items[0])
        else:
            codes = _codes_of(site, _rows_of(site, items))
            for path in items[0].part.modules:
                _pack(Site(model.get_submodule(path), site.parameter), codes)
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of ``model`` has a packed weight."""
    return any(isinstance(module, Packed) for module in model.modules())


def _rows_of(site: Site, items: Sequence[CompressedPart]) -> PackedRows:
    """Return the rows of all blocks of a weight; those of a kept block are copied, because the weight is removed."""
    whole = site.rows
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
        stored = {key.removeprefix(start): array for key, array in item.stored.items() if key.startswith(start)}
        factor = Site(module.get_submodule(name))
        _pack(factor, _codes_of(factor, packed_rows([(item.transform.then, stored, target)])))


def _codes_of(site: Site, rows: PackedRows) -> _Codes:
    weight = site.weight
    restore = functools.partial(site.restored, shape=weight.shape)
    return _Codes(rows, restore, weight.shape, weight.dtype, weight.device)


def _pack(site: Site, codes: _Codes) -> None:
    module = site.module
    packed = {**getattr(module, "_packed", {}), site.parameter: codes}
    kind: type[nn.Module] = module._unpacked if isinstance(module, Packed) else type(module)
    del module._parameters[site.parameter]
    module.__class__ = _packed_class(kind, tuple(packed))  # type: ignore[arg-type]
    vars(module).update(_packed=packed)
