"""Codes of a few bits with one scale for every group of weights along a row, as inference engines run them.

A row ``w`` is cut into groups of ``group_size`` weights (the last may be shorter). A group becomes ``s·(q - z)`` with
a scale ``s`` in its own float type and whole codes ``q`` of ``bits`` bits. If symmetric, ``z`` is the middle code and
not written, and ``s`` may have either sign. If asymmetric, ``z`` is one of the codes, written in ``bits`` bits.
Scales and zero points minimise the squared error. If compensated, codes and scales are then improved to minimise the
error of the layer's output on the calibration data (`qcompress.transforms.quantize.compensation`), in the same bytes.
"""

import functools
import math
import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.column_blocks import STEP
from qcompress.transforms.quantize.grid import Grid, in_groups, spread
from qcompress.transforms.quantize.packing import pack, packed_bytes, unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize, dequantized, nonzero

SCALE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_BITS = 8


@dataclass(frozen=True)
class GroupWise(PruneQuantize):
    """Store the weights in ``bits`` bits each and one scale per group, after pruning the share ``sparsity``.

    Args:
        bits: bits per weight, 2 to 8.
        sparsity, compensated: same as in `PruneQuantize`.
        group_size: weights of a row that share a scale, at least 2; None for the whole row.
        symmetric: whether to store no zero points.
        scale_dtype: one of `SCALE_TYPES`; by default bfloat16 for bfloat16 weights, else float16. A scale outside the
            type's range is clipped to it.

    Raises:
        OptionsError: a value is outside its range.

    >>> transform = GroupWise(bits=4, group_size=32, symmetric=False)
    >>> transform.label
    '4 bits in groups of 32, asymmetric'
    >>> target = Target(layer="Linear", channels=8, per_channel=80, dtype=torch.float32, macs=640)
    >>> transform.size_bytes(target)  # 640 codes and 24 zero points of 4 bits, 24 scales of 2 bytes
    380
    >>> target = Target(layer="Linear", channels=1, per_channel=4, dtype=torch.float32, macs=4)
    >>> GroupWise(bits=2, group_size=2).approximate(Weight(torch.tensor([[8.0, 4.0, 0.5, -1.0]]), target))
    tensor([[ 8.0000,  4.0000,  0.5000, -1.0000]])
    """

    kind: ClassVar[str] = "group_wise"

    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits > MAX_BITS:
            raise OptionsError(f"bits in groups must be a whole number from 2 to {MAX_BITS}, found {self.bits!r}")
        if self.group_size is not None:
            object.__setattr__(self, "group_size", _group_size(self.group_size))
        if not isinstance(self.symmetric, bool):
            raise OptionsError(f"symmetric must be True or False, found {self.symmetric!r}")
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_TYPES:
            raise OptionsError(f"scale_dtype must be one of {', '.join(SCALE_TYPES)}, found {self.scale_dtype!r}")

    @property
    def label(self) -> str:
        """Short name, such as ``"4 bits in groups of 32, asymmetric, float32 scales, compensated"``."""
        bits, *rest = super().label.split(", ")
        where = " by row" if self.group_size is None else f" in groups of {self.group_size}"
        zeros = [] if self.symmetric else ["asymmetric"]
        scales = [] if self.scale_dtype is None else [f"{self.scale_dtype} scales"]
        return ", ".join([bits + where, *zeros, *scales, *rest])

    def takes_blocks(self, target: Target) -> bool:
        """Whether no group of weights straddles two blocks."""
        return super().takes_blocks(target) and (self.group_size is None or STEP % self.group_size == 0)

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of the kept weights' codes, the scales, the zero points and, with pruning, the bitmap."""
        groups = target.channels * self.num_groups(target)
        codes = packed_bytes(self._num_kept(target.num_weights), self.bits)
        zeros = 0 if self.symmetric else packed_bytes(groups, self.bits)
        mask = packed_bytes(target.num_weights, 1) if self.sparsity else 0
        return codes + self.scale_type(target).itemsize * groups + zeros + mask

    def scale_type(self, target: Target) -> torch.dtype:
        """Return the dtype that scales are stored in."""
        default = "bfloat16" if target.dtype == torch.bfloat16 else "float16"
        return SCALE_TYPES[self.scale_dtype or default]

    def num_groups(self, target: Target) -> int:
        """Return the number of groups in a row."""
        return -(-target.per_channel // self._size(target))

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return ``codes``, ``zeros`` and ``mask`` (packed, uint8) and ``scales`` ``(channels · groups,)``.

        Raises:
            ModelError: a weight is not finite or exceeds float32.
            OptionsError: the transform is compensated and the moments are missing.
        """
        codes, grid, kept = self._in_groups(weight)
        codes -= spread(grid.low, grid.group_size, codes.shape[1])
        stored = {
            "codes": pack(codes.view(-1) if kept is None else codes[kept], self.bits),
            "scales": grid.scales.reshape(-1).to(self.scale_type(weight.target)),
        }
        if not self.symmetric:
            stored["zeros"] = pack(-grid.low.reshape(-1).to(torch.int32), self.bits)
        return stored if kept is None else stored | {"mask": pack(kept.view(-1), 1)}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return scale times (code minus zero point); 0 where pruned."""
        codes = unpack(stored["codes"], self.bits, self._num_kept(target.num_weights), torch.float32)
        zeros, scales = self.zero_points(stored, target).float(), stored["scales"].to(torch.float32)
        size, channels = self._size(target), target.channels
        if self.sparsity or target.per_channel % size:
            zeros, scales = (
                spread(each.view(channels, -1), size, target.per_channel)[..., None] for each in (zeros, scales)
            )
        else:
            zeros, scales = zeros[..., None], scales.view(channels, -1, 1)
        if self.sparsity:
            mask = unpack(stored["mask"], 1, target.num_weights).to(torch.bool)
            codes = zeros.flatten().masked_scatter(mask, codes)
        codes = codes.view(*zeros.shape[:2], -1).sub_(zeros)
        return dequantized(codes, scales, target.dtype).view(channels, target.per_channel)

    def approximate(self, weight: Weight) -> Tensor:
        """Return what `decode` gives for `encode`, without packing and unpacking."""
        codes, grid, _ = self._in_groups(weight)
        return dequantized(codes.add_(0.0), grid.spread(codes.shape[1]), weight.target.dtype)

    def zero_points(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return the code that stands for 0 in every group, ``(channels, groups)`` int32 from 0 to ``2**bits - 1``."""
        shape = target.channels, self.num_groups(target)
        if self.symmetric:
            return torch.full(shape, 2 ** (self.bits - 1), dtype=torch.int32, device=stored["codes"].device)
        return unpack(stored["zeros"], self.bits, shape[0] * shape[1]).view(shape)

    def _size(self, target: Target) -> int:
        return target.per_channel if self.group_size is None else min(self.group_size, target.per_channel)

    def _in_groups(self, weight: Weight) -> tuple[Tensor, Grid, Tensor | None]:
        """Codes minus zero points as float32 rows (0 where pruned), their grid, and which weights are kept."""
        rows, kept = self._rows(weight)
        groups = in_groups(rows if kept is None else rows * kept, self._size(weight.target))
        grid = self._nearest_grid(groups, self.scale_type(weight.target))
        low, high, scales = (each[..., None] for each in (grid.low, grid.high, grid.scales))
        codes = (groups / nonzero(scales)).masked_fill_(scales == 0, 0.0).round_().clamp_(low, high)
        codes = codes.flatten(1)[:, : rows.shape[1]].contiguous()
        if self.compensated:
            codes, scales = self._compensate(weight, rows, codes, grid, kept)
            grid = replace(grid, scales=scales)
        return codes, grid, kept

    def _nearest_grid(self, groups: Tensor, dtype: torch.dtype) -> Grid:
        """Return the grid whose scales (in ``dtype``) and zero points minimise the squared error of `in_groups`."""
        from qcompress.transforms.quantize.scales import best_ranges, best_scales  # here: numba is slow to import

        channels, levels = len(groups), 2 ** (self.bits - 1)
        peaks = torch.linalg.vector_norm(groups, math.inf, dim=2).view(-1)
        unit = (groups.view(len(peaks), -1) / nonzero(peaks)[:, None]).numpy()
        if self.symmetric:
            scales, zeros = torch.from_numpy(best_scales(unit, self.bits)), torch.full_like(peaks, levels)
        else:
            scales, zeros = map(torch.from_numpy, best_ranges(unit, self.bits))
        low = -zeros.view(channels, -1)
        scales = (scales * peaks).view(channels, -1)
        return Grid(
            scales=_stored_in(dtype, scales),
            low=low,
            high=low + (2 * levels - 1),
            group_size=groups.shape[2],
            storable=functools.partial(_stored_in, dtype),
        )


def _stored_in(dtype: torch.dtype, scales: Tensor) -> Tensor:
    limit = torch.finfo(dtype).max
    return scales.clamp(-limit, limit).to(dtype).to(torch.float32)


def _group_size(value: object) -> int:
    wrong = OptionsError(f"group_size must be a whole number from 2, or None for whole rows; found {value!r}")
    try:
        size = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise wrong from error
    if isinstance(value, bool) or size < 2:
        raise wrong
    return size
