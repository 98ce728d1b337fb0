"""Prune whole filters and quantize the others: codes and scales of the kept rows, and a bitmap of the kept rows."""

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Target, Transform, Weight
from qcompress.transforms.quantize.packing import pack, packed_bytes, unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize


@dataclass(frozen=True)
class PruneFilters(Transform):
    """Prune the ``num_pruned`` rows of smallest L1 norm and store the others in ``bits`` bits per weight.

    Rows of zeros are pruned first, so any set of filters can be pruned by setting it to zero beforehand.

    Args:
        bits: bits per weight, 2 to 16.
        num_pruned: number of pruned rows; the first among rows of equal norm are pruned.

    Raises:
        OptionsError: a value is outside its range.

    >>> transform = PruneFilters(bits=4, num_pruned=1)
    >>> target = Target(layer="Conv2d", channels=3, per_channel=2, dtype=torch.float32, macs=6)
    >>> transform.size_bytes(target)  # 4 codes of 4 bits, 2 scales, 3 bits of mask
    11
    >>> transform.approximate(Weight(torch.tensor([[1.0, 1.0], [0.1, 0.1], [2.0, -2.0]]), target))
    tensor([[ 1.,  1.],
            [ 0.,  0.],
            [ 2., -2.]])
    """

    kind: ClassVar[str] = "prune_filters"
    decodes_anywhere: ClassVar[bool] = True

    bits: int
    num_pruned: int = 0

    def __post_init__(self) -> None:
        try:
            num_pruned = operator.index(self.num_pruned)
        except TypeError as error:
            raise OptionsError(f"num_pruned must be a whole number, found {self.num_pruned!r}") from error
        if isinstance(self.num_pruned, bool) or num_pruned < 0:
            raise OptionsError(f"num_pruned must be a whole number, not negative, found {self.num_pruned!r}")
        object.__setattr__(self, "bits", PruneQuantize(self.bits).bits)
        object.__setattr__(self, "num_pruned", num_pruned)

    @property
    def label(self) -> str:
        """Short name, such as ``"4 bits"`` or ``"4 bits, 3 filters pruned"``."""
        return f"{self.bits} bits" + (f", {self.num_pruned} filters pruned" if self.num_pruned else "")

    def why_not(self, target: Target) -> str:
        """Return a reason if the layer has fewer filters than are to be pruned."""
        return f"has {target.channels} filters" if self.num_pruned > target.channels else ""

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of codes and a float32 scale for each kept row and, with pruning, one bit for every row."""
        mask = packed_bytes(target.channels, 1) if self.num_pruned else 0
        return self._quantizer.size_bytes(self._kept(target)) + mask

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return ``codes`` and ``mask`` (packed, uint8) and ``scales`` ``(kept rows,)`` float32.

        Raises:
            ModelError: a kept weight is not finite or exceeds float32.
        """
        if not self.num_pruned:
            return self._quantizer.encode(weight)
        exact = weight.rows.detach().cpu()
        norms = exact.double().abs().sum(dim=1)
        kept = torch.ones(len(exact), dtype=torch.bool)
        kept[norms.argsort(stable=True)[: self.num_pruned]] = False
        return self._quantizer.encode(Weight(exact[kept], self._kept(weight.target))) | {"mask": pack(kept, 1)}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return code times scale; 0 where pruned."""
        kept = self._quantizer.decode(stored, self._kept(target))
        if not self.num_pruned:
            return kept
        rows = kept.new_zeros(target.channels, target.per_channel)
        rows[unpack(stored["mask"], 1, target.channels).to(torch.bool)] = kept
        return rows

    @property
    def _quantizer(self) -> PruneQuantize:
        return PruneQuantize(self.bits)

    def _kept(self, target: Target) -> Target:
        return replace(target, channels=target.channels - self.num_pruned)
