"""Common representation for engines with integer weights: a stored part as codes, scales and zero points."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.transforms.base import Target, Transform
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.packing import unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the weights of a part are written, without the numbers.

    Attributes:
        bits: bits per code.
        group_size: weights of a row that share a scale; None for the whole row.
        symmetric: whether there are no zero points.
        scale_type: dtype of the scales.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_type: torch.dtype

    def num_groups(self, target: Target) -> int:
        """Return the number of groups in a row."""
        return 1 if self.group_size is None else -(-target.per_channel // self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerCodes:
    """The numbers of a part: a weight is ``scale · (code - zero point)`` in float32, rounded to the weight's dtype.

    Attributes:
        codes: ``(channels, per_channel)`` int32 from 0 to ``2**bits - 1``.
        scales: ``(channels, groups)``.
        zeros: ``(channels, groups)`` int32 from 0 to ``2**bits - 1``; if symmetric, the middle code everywhere.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def scheme_of(transform: Transform, target: Target) -> Scheme | None:
    """Return the scheme of a transform that stores only codes, scales and zero points, else None.

    >>> target = Target(layer="Linear", channels=8, per_channel=64, dtype=torch.float32, macs=512)
    >>> scheme_of(GroupWise(bits=4, group_size=32), target)
    Scheme(bits=4, group_size=32, symmetric=True, scale_type=torch.float16)
    >>> scheme_of(PruneQuantize(bits=4, sparsity=0.5), target) is None
    True
    """
    if isinstance(transform, GroupWise) and not transform.sparsity:
        scale_type, size = transform.scale_type(target), transform.group_size
        whole = size is None or size > target.per_channel  # a single group, longer than the row
        return Scheme(
            bits=transform.bits,
            group_size=None if whole else size,
            symmetric=transform.symmetric,
            scale_type=scale_type,
        )
    if type(transform) is PruneQuantize and not transform.sparsity:
        return Scheme(bits=transform.bits, group_size=None, symmetric=True, scale_type=torch.float32)
    return None


def integer_codes(transform: Transform, stored: dict[str, Tensor], target: Target) -> IntegerCodes:
    """Unpack the stored arrays of a part whose transform has a scheme."""
    scheme = scheme_of(transform, target)
    assert scheme is not None  # noqa: S101
    codes = unpack(stored["codes"], scheme.bits, target.num_weights).view(target.channels, target.per_channel)
    scales = stored["scales"].view(target.channels, -1)
    zeros = torch.full(scales.shape, 2 ** (scheme.bits - 1), dtype=torch.int32)
    if isinstance(transform, GroupWise):
        zeros = transform.zero_points(stored, target)
    return IntegerCodes(codes=codes, scales=scales, zeros=zeros)
