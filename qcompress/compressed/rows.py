"""Decode individual rows of a weight from its stored arrays, without decoding the others.

Codes of a few bits are stored in sequence, so the position of a row follows from its number; with pruning, also from
the number of weights kept before it, which is counted once. The loops use numba, because codes share bytes with their
neighbours, and unpacking them with array operations would need many times the memory of the rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.packing import unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize


class PackedRows(ABC):
    """Rows ``(channels, per_channel)`` that are decoded on request."""

    channels: int

    @abstractmethod
    def rows(self, numbers: Tensor) -> Tensor:
        """Return the rows with the given numbers ``(n,)``."""

    def block(self, start: int, stop: int) -> Tensor:
        """Return the rows from ``start`` to before ``stop``."""
        return self.rows(torch.arange(start, stop))


def packed_rows(blocks: Sequence[tuple[Transform, dict[str, Tensor], Target]]) -> PackedRows:
    """Return the rows of consecutive blocks of channels, each a transform with its stored arrays and its target.

    >>> from qcompress.transforms.base import Weight
    >>> target = Target(layer="Linear", channels=3, per_channel=4, dtype=torch.float32, macs=12)
    >>> transform, weight = PruneQuantize(4), torch.arange(12.0).reshape(3, 4)
    >>> packed = packed_rows([(transform, transform.encode(Weight(weight, target)), target)])
    >>> torch.equal(packed.rows(torch.tensor([2])), transform.approximate(Weight(weight, target))[2:])
    True
    """
    packed = [_block(*block) for block in blocks]
    return packed[0] if len(packed) == 1 else _Stacked(packed)


def _block(transform: Transform, stored: dict[str, Tensor], target: Target) -> PackedRows:
    if isinstance(transform, Keep):
        return _Dense(stored["rows"])
    if type(transform) in (PruneQuantize, GroupWise):
        return _Coded(transform, stored, target)  # type: ignore[arg-type]
    return _Whole(transform, stored, target)


class _Dense(PackedRows):
    """Rows that are not encoded."""

    def __init__(self, rows: Tensor) -> None:
        self.channels, self._rows = len(rows), rows

    def rows(self, numbers: Tensor) -> Tensor:
        return self._rows[numbers]


class _Whole(PackedRows):
    """Rows of a transform that can only decode all of them."""

    def __init__(self, transform: Transform, stored: dict[str, Tensor], target: Target) -> None:
        self.channels = target.channels
        self._transform, self._stored, self._target = transform, stored, target

    def rows(self, numbers: Tensor) -> Tensor:
        return self._transform.decode(self._stored, self._target)[numbers]


class _Stacked(PackedRows):
    """Rows of consecutive blocks."""

    def __init__(self, blocks: Sequence[PackedRows]) -> None:
        self._blocks = blocks
        self._stops = torch.tensor([block.channels for block in blocks]).cumsum(0)
        self.channels = int(self._stops[-1])

    def rows(self, numbers: Tensor) -> Tensor:
        place = torch.searchsorted(self._stops, numbers, right=True)
        pieces, order = [], []
        for index in torch.unique(place).tolist():
            chosen = (place == index).nonzero().view(-1)
            block = self._blocks[index]
            pieces.append(block.rows(numbers[chosen] - int(self._stops[index]) + block.channels))
            order.append(chosen)
        stacked = torch.cat(pieces)
        return stacked[torch.cat(order).argsort()]


class _Coded(PackedRows):
    """Rows of codes with scales, with or without pruning."""

    def __init__(self, transform: PruneQuantize, stored: dict[str, Tensor], target: Target) -> None:
        self.channels, self._columns, self._dtype = target.channels, target.per_channel, target.dtype
        self._bits, self._codes = transform.bits, stored["codes"]
        self._scales = stored["scales"].view(self.channels, -1)
        self._zeros, self._group_size = torch.tensor([[2 ** (transform.bits - 1)]]), target.per_channel
        if isinstance(transform, GroupWise):
            self._group_size = min(transform.group_size or target.per_channel, target.per_channel)
            if not transform.symmetric:
                self._zeros = transform.zero_points(stored, target)
        self._zeros = self._zeros.to(torch.uint8 if transform.bits <= 8 else torch.int32)
        self._zeros = self._zeros.expand(self._scales.shape)
        self._mask = stored.get("mask")
        if self._mask is not None:
            kept = unpack(self._mask, 1, target.num_weights).view(self.channels, -1).sum(1)
            self._before = kept.cumsum(0) - kept

    def rows(self, numbers: Tensor) -> Tensor:
        from qcompress.compressed import row_kernels  # here: numba is slow to import

        decoded = torch.empty(len(numbers), self._columns)
        scales, zeros = self._scales[numbers].to(torch.float32), self._zeros[numbers].to(torch.int32)
        tables = numbers.numpy(), scales.numpy(), zeros.numpy(), self._group_size, decoded.numpy()
        codes = self._codes.numpy()
        if self._mask is None:
            row_kernels.decode(codes, self._bits, *tables)
        else:
            before = self._before[numbers].numpy()
            row_kernels.decode_kept(codes, self._mask.numpy(), before, self._bits, *tables)
        limit = min(torch.finfo(self._dtype).max, torch.finfo(torch.float32).max)
        return decoded.clamp_(-limit, limit).to(self._dtype)
