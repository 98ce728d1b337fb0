"""Low rank: a weight ``(m, n)`` as the product of ``(m, r)`` and ``(r, n)``, the closest of that rank.

The factors are those of the truncated singular value decomposition (Eckart-Young), with the singular values shared
evenly between them so that both keep their digits in half precision. The layer is replaced by two smaller ones,
which saves multiply-accumulates as well as bytes.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompress.errors import ModelError, OptionsError
from qcompress.transforms.base import Target, Transform


@dataclass(frozen=True)
class LowRank(Transform):
    """Two factors with about the share ``ratio`` of the weights: rank ``floor(ratio · m·n / (m + n))``.

    Args:
        ratio: above 0, below 1.

    Raises:
        OptionsError: a ratio outside its range.

    >>> target = Target(layer="Linear", channels=64, per_channel=64, dtype=torch.float32, macs=4096)
    >>> transform = LowRank(ratio=0.25)
    >>> transform.rank(target), transform.size_bytes(target), transform.macs(target)
    (8, 4096, 1024.0)
    """

    kind: ClassVar[str] = "low_rank"

    ratio: float

    def __post_init__(self) -> None:
        try:
            ratio = float(self.ratio)
        except (TypeError, ValueError) as error:
            raise OptionsError(f"a ratio must be a number above 0 and below 1, found {self.ratio!r}") from error
        if not 0 < ratio < 1:
            raise OptionsError(f"a ratio must be a number above 0 and below 1, found {self.ratio!r}")
        object.__setattr__(self, "ratio", ratio)

    @property
    def label(self) -> str:
        """As ``"rank for 25 %"``: of the weights."""
        return f"rank for {100 * self.ratio:.12g} %"

    def rank(self, target: Target) -> int:
        """Columns of the factors, 0 where not even one pays."""
        return _rank(self.ratio, target.channels, target.per_channel)

    def why_not(self, target: Target) -> str:
        """It needs a whole Linear or ungrouped Conv2d of its own, large enough for rank 1."""
        if target.layer not in ("Linear", "Conv2d"):
            return f"only Linear and Conv2d can be factored, not {target.layer}"
        if not (target.whole and target.replaceable):
            return "a block of channels, a grouped or a shared layer cannot be replaced by two layers"
        if self.rank(target) < 1:
            return f"rank 1 already takes more than {100 * self.ratio:.12g} % of the weights"
        return ""

    def size_bytes(self, target: Target) -> int:
        """Both factors in the weight's dtype."""
        return self.rank(target) * (target.channels + target.per_channel) * target.dtype.itemsize

    def macs(self, target: Target) -> float:
        """Those of the two layers."""
        return target.macs * self.rank(target) * (target.channels + target.per_channel) / target.num_weights

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """``reduce (rank, n)`` and ``expand (m, rank)``.

        Raises:
            ModelError: a weight is not finite.
        """
        rows = rows.detach().cpu()
        if not bool(torch.isfinite(rows).all()):
            raise ModelError("the weight holds NaN or infinity")
        rank = _rank(self.ratio, *rows.shape)
        weight = rows.double()
        basis = _basis(_ByValue(weight))[:, -rank:].flip(1)
        tall = len(weight) > weight.shape[1]
        core = weight @ basis if tall else weight.T @ basis  # columns: singular vectors times singular values
        values = core.norm(dim=0)
        roots = torch.where(values > 0, values, torch.ones(())).sqrt()
        own, other = (basis * roots).to(rows.dtype), (core / roots).to(rows.dtype)
        reduce, expand = (own.T, other) if tall else (other.T, own)
        return {"reduce": reduce.contiguous(), "expand": expand.contiguous()}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """The product, added up in float32 (or the weight's dtype if that is wider)."""
        wide = torch.promote_types(target.dtype, torch.float32)
        return (stored["expand"].to(wide) @ stored["reduce"].to(wide)).to(target.dtype)

    def factors(self, stored: dict[str, Tensor], target: Target) -> tuple[Tensor, ...]:  # noqa: ARG002
        """``reduce`` and ``expand``."""
        return stored["reduce"], stored["expand"]


def _rank(ratio: float, channels: int, per_channel: int) -> int:
    return math.floor(ratio * channels * per_channel / (channels + per_channel))


class _ByValue:
    """A tensor that is equal to another one when their values are: the key of a cache."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __hash__(self) -> int:
        return hash(self.tensor.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and torch.equal(self.tensor, other.tensor)


@functools.lru_cache(maxsize=1)  # all ratios of one weight ask one after the other
def _basis(weight: _ByValue) -> Tensor:
    """Singular vectors of the shorter side of a float64 weight ``(m, n)``, as columns, the largest value last.

    From the eigenvectors of the shorter Gram matrix: much faster than a full decomposition. Squaring costs half the
    digits of the small singular values, which in float64 leaves more than a float32 weight has.
    """
    rows = weight.tensor
    gram = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors
