"""Pruning and quantization of weights: the smallest are removed, the rest become codes of a few bits.

Pruning is unstructured, by magnitude over all given rows; a bitmap records which weights are kept. Quantization is
symmetric (no zero point), with one float32 scale per row that minimises the squared error over the kept weights
(`qcompress.transforms.quantize.scales`). The codes of the kept weights, the scales and, with pruning, the bitmap are
written. If compensated, the same bytes hold codes and scales that minimise the error of the layer's output on the
calibration data (`qcompress.transforms.quantize.compensation`).
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompress.errors import ModelError, OptionsError
from qcompress.transforms.base import Target, Transform, Weight, moments_missing
from qcompress.transforms.quantize.grid import Grid
from qcompress.transforms.quantize.packing import MAX_BITS, pack, packed_bytes, unpack


@dataclass(frozen=True)
class PruneQuantize(Transform):
    """Prune the share ``sparsity`` of the weights and store the others in ``bits`` bits each.

    Args:
        bits: bits per weight, 2 to 16.
        sparsity: at least 0, less than 1; exactly ``floor(sparsity · weights)`` are pruned, the first among equal ones.
        compensated: whether the kept weights compensate for the errors on the layer's calibration inputs. Where rows
            have no common input, as in an Embedding, it resolves to rounding to nearest.

    Raises:
        OptionsError: a value is outside its range.

    >>> transform = PruneQuantize(bits=4, sparsity=0.5)
    >>> transform.label
    '4 bits, 50 % sparse'
    >>> target = Target(layer="Linear", channels=8, per_channel=16, dtype=torch.float32, macs=128)
    >>> transform.size_bytes(target)  # 64 codes of 4 bits, 8 scales, 128 bits of mask
    80
    >>> target = Target(layer="Linear", channels=1, per_channel=4, dtype=torch.float32, macs=4)
    >>> transform.approximate(Weight(torch.tensor([[1.0, 0.1, -0.5, 0.2]]), target))
    tensor([[ 1.0000,  0.0000, -0.5000,  0.0000]])
    """

    kind: ClassVar[str] = "prune_quantize"
    decodes_anywhere: ClassVar[bool] = True

    bits: int
    sparsity: float = 0.0
    compensated: bool = False

    def __post_init__(self) -> None:
        try:
            bits = operator.index(self.bits)
        except TypeError as error:
            raise OptionsError(f"bits must be a whole number from 2 to {MAX_BITS}, found {self.bits!r}") from error
        if isinstance(self.bits, bool) or not 2 <= bits <= MAX_BITS:
            raise OptionsError(f"bits must be a whole number from 2 to {MAX_BITS}, found {self.bits!r}")
        try:
            sparsity = float(self.sparsity)
        except (TypeError, ValueError) as error:
            raise OptionsError(f"sparsity must be a number from 0 to below 1, found {self.sparsity!r}") from error
        if not 0 <= sparsity < 1:
            raise OptionsError(f"sparsity must be a number from 0 to below 1, found {self.sparsity!r}")
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "sparsity", sparsity)
        if not isinstance(self.compensated, bool):
            raise OptionsError(f"compensated must be True or False, found {self.compensated!r}")

    @property
    def label(self) -> str:
        """Short name, such as ``"4 bits"`` or ``"4 bits, 50 % sparse, compensated"``."""
        sparse = f", {100 * self.sparsity:.12g} % sparse" if self.sparsity else ""
        return f"{self.bits} bits{sparse}" + (", compensated" if self.compensated else "")

    @property
    def nearest(self) -> "PruneQuantize":
        """The same transform, rounded to nearest."""
        return replace(self, compensated=False)

    def to_json(self) -> dict[str, Any]:
        """Return the transform as JSON; ``compensated`` is left out when False, as in older files."""
        value = super().to_json()
        return value if self.compensated else {name: entry for name, entry in value.items() if name != "compensated"}

    def needs_moments(self, target: Target) -> bool:
        """Whether it is compensated and the rows, or each group of them, have a common input."""
        return self.compensated and (target.common_input or target.input_groups > 1)

    def takes_blocks(self, target: Target) -> bool:
        """Whether all rows have the same inputs."""
        return target.input_groups == 1

    def resolve(self, weight: Weight) -> "PruneQuantize | None":
        """Return itself where it saves bytes; rounded to nearest where there are no inputs to compensate on."""
        if self.why_not(weight.target):
            return None
        return self if self.needs_moments(weight.target) else self.nearest

    def why_not(self, target: Target) -> str:
        """It fits everywhere, but saves nothing for a few weights or narrow dtypes."""
        size_bytes = self.size_bytes(target)
        dense = target.dense_bytes
        return f"takes {size_bytes} bytes, the weight itself {dense}" if size_bytes >= dense else ""

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of the kept weights' codes, a float32 scale per row and, with pruning, a bit per weight."""
        codes = packed_bytes(self._num_kept(target.num_weights), self.bits)
        mask = packed_bytes(target.num_weights, 1) if self.sparsity else 0
        return codes + 4 * target.channels + mask

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return ``codes`` and ``mask`` (packed, uint8) and ``scales`` ``(channels,)`` float32.

        Raises:
            ModelError: a weight is not finite or exceeds float32.
            OptionsError: the transform is compensated and the moments are missing.
        """
        codes, scales, kept = self._quantized(weight)
        shifted = codes.to(torch.int32).add_(2 ** (self.bits - 1))
        if kept is None:
            return {"codes": pack(shifted.view(-1), self.bits), "scales": scales}
        return {"codes": pack(shifted[kept], self.bits), "scales": scales, "mask": pack(kept.view(-1), 1)}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return code times scale; 0 where pruned."""
        codes = unpack(stored["codes"], self.bits, self._num_kept(target.num_weights), torch.float32)
        codes.sub_(2 ** (self.bits - 1))
        if self.sparsity:
            mask = unpack(stored["mask"], 1, target.num_weights).to(torch.bool)
            codes = codes.new_zeros(target.num_weights).masked_scatter_(mask, codes)
        return dequantized(codes.view(target.channels, target.per_channel), stored["scales"][:, None], target.dtype)

    def approximate(self, weight: Weight) -> Tensor:
        """Return what `decode` gives for `encode`, without packing and unpacking."""
        codes, scales, _ = self._quantized(weight)
        return dequantized(codes.add_(0.0), scales[:, None], weight.target.dtype)  # stored codes have no -0

    def _quantized(self, weight: Weight) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes as float32 rows (0 where pruned), scales ``(channels,)``, and which weights are kept (None for all)."""
        rows, kept = self._rows(weight)
        masked = rows if kept is None else rows * kept
        scales = _scales(masked, self.bits)[:, None]
        levels = torch.full_like(scales, 2 ** (self.bits - 1))
        codes = (masked / nonzero(scales)).round_().clamp_(-levels, levels - 1)
        if self.compensated:
            grid = Grid(scales=scales, low=-levels, high=levels - 1, group_size=rows.shape[1])
            codes, scales = self._compensate(weight, rows, codes, grid, kept)
        return codes, scales[:, 0], kept

    def _rows(self, weight: Weight) -> tuple[Tensor, Tensor | None]:
        """Return the rows in float32 on the CPU, and which weights are kept (None for all)."""
        rows = weight.rows
        exact = rows.detach().cpu().to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        weights = exact.to(torch.float32)
        if not bool(torch.isfinite(weights).all()):
            raise ModelError("the weight holds NaN, infinity or numbers beyond float32")
        if not self.sparsity:
            return weights, None
        kept = weight.once(("kept", self.sparsity), lambda: self._kept(exact.view(-1)))  # the same for all bits
        return weights, kept.view_as(weights)

    def _compensate(
        self, weight: Weight, rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales ``(channels, groups)`` whose errors compensate for each other."""
        if weight.moments is None or weight.moments.ndim < 2:
            raise OptionsError(moments_missing(self.label))
        kept = torch.ones_like(rows, dtype=torch.bool) if kept is None else kept
        if weight.has_blocks:
            return self._compensate_block(weight, weight.moments, 0, rows, codes, grid, kept)
        moments = weight.moments if weight.moments.ndim == 3 else weight.moments[None]
        blocks = []
        for index, indices in enumerate(torch.arange(len(rows)).chunk(len(moments))):
            block = slice(int(indices[0]), int(indices[-1]) + 1)
            blocks.append(
                self._compensate_block(
                    weight, moments[index], index, rows[block], codes[block], grid[block], kept[block]
                )
            )
        return torch.cat([block_codes for block_codes, _ in blocks]), torch.cat([scales for _, scales in blocks])

    def _compensate_block(
        self, weight: Weight, moments: Tensor, index: int, rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compensate the rows that share one input with second moments ``moments``, one matrix or blocks of columns."""
        # imported here because numba is slow to import
        from qcompress.transforms.quantize.compensation_in_blocks import blocks_of, compensated_in_blocks

        blocks = weight.once_of_inputs(("blocks", index), lambda: blocks_of(moments, rows.shape[1], weight.num_inputs))
        if not blocks:  # all inputs are zero: nothing is lost either way
            return codes, grid.scales
        peaks = nonzero(rows.abs().amax(dim=1))
        sizes = torch.ldexp(torch.ones_like(peaks), torch.frexp(peaks).exponent - 1)  # powers of two: exact scaling
        codes, scales = compensated_in_blocks(rows / sizes[:, None], codes, grid.of_size(sizes), kept, blocks)
        return codes, scales * sizes[:, None]

    def _num_kept(self, num_weights: int) -> int:
        return num_weights - math.floor(self.sparsity * num_weights)

    def _kept(self, weights: Tensor) -> Tensor:
        """Which of ``(n,)`` weights are kept: all but the smallest magnitudes."""
        magnitudes = weights.abs()
        num_pruned = len(weights) - self._num_kept(len(weights))
        if num_pruned == 0:
            return torch.ones_like(magnitudes, dtype=torch.bool)
        limit = magnitudes.kthvalue(num_pruned).values
        kept = magnitudes > limit
        ties = (magnitudes == limit).nonzero().view(-1)
        kept[ties[num_pruned - int((magnitudes < limit).sum()) :]] = True
        return kept


def dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return codes times scales in float32, clipped and rounded to ``dtype``; overwrites ``codes``."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return codes.mul_(scales).clamp_(-limit, limit).to(dtype)


def _scales(weights: Tensor, bits: int) -> Tensor:
    """Scales ``(channels,)`` of float32 rows; 0 for a row of zeros."""
    from qcompress.transforms.quantize.scales import best_scales  # here: numba is slow to import

    peaks = weights.abs().amax(dim=1)
    return torch.from_numpy(best_scales((weights / nonzero(peaks)[:, None]).numpy(), bits)) * peaks


def nonzero(divisors: Tensor) -> Tensor:
    """Return the divisors with 0 replaced by 1."""
    return torch.where(divisors == 0, torch.ones(()), divisors)
