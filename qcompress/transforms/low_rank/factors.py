"""Low rank: a weight as the product of small factors, and the layer as the smaller layers that hold them.

This saves multiply-accumulates as well as bytes. A `LowRank` has fixed ranks; a `RankRule` is offered for all layers (a
share of the weights, a share of the energy, a rank) and resolves to a `LowRank` for each weight. The factors may in
turn be pruned and quantized: rank, sparsity and bits are then one option.

The approximated weight is the product of the stored factors, accumulated in float32 (or the weight's dtype if wider)
and rounded to the weight's dtype. The smaller layers accumulate in another order and do not round the product, so their
outputs equal those of the dense layer with that weight up to the rounding of the dtype.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.scalars import as_flag
from qcompress.transforms.base import Keep, Offer, Target, Transform, Weight, moments_missing
from qcompress.transforms.column_blocks import times
from qcompress.transforms.low_rank.forms import (
    Channels,
    Factorisation,
    Factors,
    MatrixFactorisation,
    Ranks,
    Spatial,
    kernel_of,
    leveled,
    moments_of,
    refitted,
    seen_by_last,
)
from qcompress.transforms.low_rank.tucker import Tucker
from qcompress.transforms.low_rank.words import Words
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

KINDS: dict[str, Callable[[int], Factorisation]] = {
    "channels": lambda slices: Channels(),  # noqa: ARG005
    "spatial": lambda slices: Spatial(),  # noqa: ARG005
    "tucker": lambda slices: Tucker(),  # noqa: ARG005
    "sliced": Channels,
}
RULES = ("ratio", "rank", "energy")


@dataclass(frozen=True)
class _Factored(Offer):
    """The fields and checks that `LowRank` and `RankRule` share."""

    form: str = "channels"
    slices: int = 1
    whitened: bool = False
    then: Transform = field(default_factory=Keep)

    def __post_init__(self) -> None:
        if self.form not in KINDS:
            raise OptionsError(f"the kind of a low-rank layer must be one of {', '.join(KINDS)}; found {self.form!r}")
        if not isinstance(self.then, (Keep, PruneQuantize)):
            raise OptionsError(f"factors can be kept, or pruned and quantized; found {self.then!r}")
        slices = _whole(self.slices, "slices")
        if (slices > 1) != (self.form == "sliced"):
            raise OptionsError(f"'sliced' takes 2 slices or more, the other kinds 1; found {slices} for {self.form!r}")
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "whitened", as_flag(self.whitened, "whitened"))

    def needs_moments(self, target: Target) -> bool:
        """Whether it is whitened or its factors are compensated, and it fits the layer."""
        return (self.whitened or self._makes_up(target)) and not self.unfit(target)

    def replaces_layer(self, target: Target) -> bool:
        """Whether the form fits the layer."""
        return not self.unfit(target)

    def takes_blocks(self, target: Target) -> bool:
        """Whether the factors treat all input columns alike."""
        return self.form == "channels" or super().takes_blocks(target)

    @property
    def uncalibrated(self) -> "_Factored":
        """The same option with plain (unwhitened) approximations and factors rounded to nearest."""
        return replace(self, whitened=False, then=self.then.nearest)

    def layout(self, target: Target) -> Factorisation:
        """Return the form of the smaller layers."""
        return Words() if target.layer == "Embedding" and self.form == "channels" else KINDS[self.form](self.slices)

    def _details(self) -> str:
        then = "" if isinstance(self.then, Keep) else f", {self.then.label}"
        return (", whitened" if self.whitened else "") + then

    def _makes_up(self, target: Target) -> bool:
        """Whether factors are compensated by moments. Not for an Embedding: the row of a word is its output."""
        return self.then != self.then.nearest and target.layer != "Embedding"

    def _require_moments(self, weight: Weight) -> None:
        if (self.whitened or self._makes_up(weight.target)) and weight.moments is None:
            raise OptionsError(moments_missing(self.label))

    def unfit(self, target: Target) -> str:
        """Return why the layer cannot be replaced, or an empty string."""
        if target.layer not in ("Linear", "Conv2d", "Embedding"):
            return f"only Linear, Conv2d and Embedding can be factored, not {target.layer}"
        if target.layer == "Embedding" and self.form != "channels":
            return f"an Embedding has no kernel and no input channels: {self.form!r} does not fit"
        if not (target.whole and target.replaceable):
            return (
                "a block of channels, a grouped or shared layer, or one that the network uses other than by calling it "
                "cannot be replaced by smaller layers"
            )
        return self.layout(target).why_not(target)


@dataclass(frozen=True, kw_only=True)
class LowRank(_Factored, Transform):
    """Replace a weight by factors of given ranks.

    Args:
        ranks: the rank; ``(in, out)`` for ``"tucker"``.
        form: one of `KINDS`: see `qcompress.transforms.low_rank.forms`.
        slices: number of slices of the input channels for ``"sliced"``, else 1.
        whitened: whether to minimise the error on the layer's calibration inputs instead of the error of the weight.
        then: how each factor is stored. If compensated, a factor compensates for its own rounding errors where its rows
            have a common input, and the last one also for the rounding of the factors before it.

    Raises:
        OptionsError: a value is outside its range. A rank of 0 would leave only the bias and is refused.

    >>> target = Target(layer="Linear", channels=64, per_channel=64, dtype=torch.float32, macs=4096)
    >>> transform = LowRank(ranks=8)
    >>> transform.label, transform.size_bytes(target), transform.macs(target)
    ('rank 8', 4096, 1024.0)
    >>> LowRank(ranks=8, then=PruneQuantize(bits=4)).size_bytes(target)  # 1024 codes of 4 bits, 72 scales
    800
    """

    kind: ClassVar[str] = "low_rank"

    ranks: Ranks

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.ranks if isinstance(self.ranks, (tuple, list)) else (self.ranks,)
        ranks = tuple(_whole(rank, "a rank") for rank in given)
        if len(ranks) != (2 if self.form == "tucker" else 1):
            raise OptionsError(f"'tucker' takes two ranks (in, out), the other kinds one; found {self.ranks!r}")
        object.__setattr__(self, "ranks", ranks)

    @property
    def label(self) -> str:
        """Short name, such as ``"spatial rank 8, whitened, 4 bits"``."""
        return KINDS[self.form](self.slices).label(self.ranks) + self._details()

    def unfit(self, target: Target) -> str:
        """The layer must be replaceable, and its weight have these ranks."""
        if unfit := super().unfit(target):
            return unfit
        largest = self.layout(target).largest(target)
        if any(rank > most for rank, most in zip(self.ranks, largest, strict=True)):
            return f"the largest ranks of the weight are {', '.join(map(str, largest))}"
        return ""

    def why_not(self, target: Target) -> str:
        """The weight must fit and bytes or macs must be saved; compressing the factors must save bytes."""
        if unfit := self.unfit(target):
            return unfit
        whole = replace(self, then=Keep()).size_bytes(target)
        if whole >= target.dense_bytes and self.macs(target) >= target.macs:
            return f"takes {whole} bytes, the weight itself {target.dense_bytes}, and no fewer macs"
        if not isinstance(self.then, Keep) and self.size_bytes(target) >= whole:
            return f"its factors take {whole} bytes uncompressed"
        return ""

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of all factors."""
        return sum(self.then.size_bytes(factor) for factor in self.factor_targets(target).values())

    def macs(self, target: Target) -> float:
        """Multiply-accumulates of the smaller layers."""
        sizes = (factor.num_weights for factor in self.factor_targets(target).values())
        return sum(often * size for often, size in zip(self.layout(target).positions(target), sizes, strict=True))

    @property
    def nearest(self) -> "LowRank":
        """The same transform with factors rounded to nearest."""
        return replace(self, then=self.then.nearest)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return what `then` writes for each factor, under names such as ``reduce.codes``.

        Raises:
            ModelError: a weight is not finite.
            OptionsError: a rank exceeds the largest rank of the weight, or the moments are missing.
        """
        factors = self._factors(weight)
        targets = self.factor_targets(weight.target)
        if self.then == self.then.nearest:
            return self.encode_factors(factors, weight.target)
        layout, (first, *_, last) = self.layout(weight.target), factors
        calibrated = self._makes_up(weight.target)
        stored, rounded = {}, dict(factors)
        for name in factors:
            factor_weight = Weight(factors[name], targets[name])
            if name == last:
                rounded = {part: rows.double() for part, rows in rounded.items()}
                seen = seen_by_last(rounded, layout, weight)
                moments = times(seen, moments_of(weight)) @ seen.T if calibrated else seen @ seen.T
                fitted = refitted(rounded, layout, weight, whitened=calibrated)[last].to(factors[last])
                factor_weight = Weight(fitted, targets[name], moments, weight.num_inputs if calibrated else math.inf)
            elif name == first and calibrated and (into := self._into_first(weight)).moments is not None:
                factor_weight = into.block(factors[name], targets[name])
            then = self.then if factor_weight.moments is not None else self.then.nearest
            stored[name] = then.encode(factor_weight)
            rounded[name] = then.decode(stored[name], targets[name])
        return {f"{factor}.{name}": value for factor, arrays in stored.items() for name, value in arrays.items()}

    def encode_factors(self, factors: Factors, target: Target) -> dict[str, Tensor]:
        """Return what `then` writes for given factors (as rows)."""
        targets = self.factor_targets(target)
        return {
            f"{factor}.{name}": value
            for factor, rows in factors.items()
            for name, value in self.then.encode(Weight(rows, targets[factor])).items()
        }

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return the product of the stored factors, accumulated in float32 (or the dtype if wider)."""
        return self._product(self.factors(stored, target), target)

    def factors(self, stored: dict[str, Tensor], target: Target) -> Factors:
        """Return the weights of the smaller layers, in order."""
        return {
            factor: self.then.decode(
                {name.split(".")[1]: value for name, value in stored.items() if name.split(".")[0] == factor},
                factor_target,
            )
            for factor, factor_target in self.factor_targets(target).items()
        }

    def _found(self, weight: Weight) -> Factors:
        factors = self.layout(weight.target).factors(weight, self.ranks, whitened=self.whitened)
        if self.form == "tucker" or (self.whitened and self.form != "channels"):  # the others are optimal already
            factors = refitted(factors, self.layout(weight.target), weight, whitened=self.whitened)
        return leveled(factors)

    def _product(self, factors: Factors, target: Target) -> Tensor:
        wide = torch.promote_types(target.dtype, torch.float32)
        rows = self.layout(target).product(
            {name: factor.to(wide) for name, factor in factors.items()}, kernel_of(target)
        )
        return rows.to(target.dtype)

    def factor_targets(self, target: Target) -> dict[str, Target]:
        """Return the targets of the factors, in order, as `then` stores them."""
        return {
            name: Target(layer="Linear", channels=rows, per_channel=columns, dtype=target.dtype, macs=0)
            for name, (rows, columns) in self.layout(target).shapes(target, self.ranks).items()
        }

    def _into_first(self, weight: Weight) -> Weight:
        """Return a weight without rows that has the first factor's inputs; shared by all ranks."""
        layout = self.layout(weight.target)
        return weight.once_of_inputs(
            ("first", layout),
            lambda: Weight(torch.empty(0), weight.target, layout.first_moments(weight), weight.num_inputs),
        )

    def _factors(self, weight: Weight) -> Factors:
        """The factors before they are stored, in the weight's dtype or float32, whichever is wider."""
        largest = self.layout(weight.target).largest(weight.target)
        if any(rank > most for rank, most in zip(self.ranks, largest, strict=True)):
            raise OptionsError(
                f"{self.label!r} does not fit a weight whose largest rank is {', '.join(map(str, largest))}"
            )
        self._require_moments(weight)
        factors = weight.once(replace(self, then=Keep()), lambda: self._found(weight))
        wide = torch.promote_types(weight.target.dtype, torch.float32)
        return {name: factor.to(wide) for name, factor in factors.items()}


@dataclass(frozen=True, kw_only=True)
class RankRule(_Factored):
    """Offer every layer the rank that a rule gives for its weight.

    Args:
        by: the rule. ``"ratio"``: the largest rank (for ``"tucker"`` the pair of most energy) whose factors have at
            most the share ``value`` of the weights. ``"energy"``: the smallest rank (the pair with the fewest weights)
            that keeps at least the share ``value`` of ``‖W‖²``, or of ``E‖Wx‖²`` when whitened (as far as the form uses
            the moments). ``"rank"``: the rank ``value``, for both sides of ``"tucker"``.
        value: the share, above 0 and below 1; or the rank, at least 1.
        form, slices, whitened, then: same as in `LowRank`.

    Raises:
        OptionsError: a value is outside its range.
    """

    kind: ClassVar[str] = "rank_rule"

    by: str
    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in RULES:
            raise OptionsError(f"a rank is chosen by one of {', '.join(RULES)}; found {self.by!r}")
        value: Any = _whole(self.value, "a rank") if self.by == "rank" else _share(self.value, self.by)
        object.__setattr__(self, "value", value)

    @property
    def label(self) -> str:
        """Short name, such as ``"rank for 50 % of the weights"``."""
        kind = f"{self.slices} slices" if self.form == "sliced" else self.form
        start = "" if self.form == "channels" else f"{kind} "
        what = "weights" if self.by == "ratio" else "energy"
        rule = f"rank {self.value}" if self.by == "rank" else f"rank for {100 * self.value:.12g} % of the {what}"
        return start + rule + self._details()

    def by_shape(self, target: Target) -> bool:
        """Whether the rule asks for a rank, or for a share of the weights of a form with one rank."""
        if self.by == "ratio" and not self.unfit(target):
            return isinstance(self.layout(target), MatrixFactorisation)
        return self.by == "rank" or bool(self.unfit(target))

    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Return the use of the rank if the shape alone determines it, else of the smallest rank."""
        if self.unfit(target):
            return None
        layout = self.layout(target)
        ranks: Ranks | None = (1,) * len(layout.largest(target))
        if self.by == "rank":
            ranks = (int(self.value),) * len(layout.largest(target))
        elif self.by == "ratio" and isinstance(layout, MatrixFactorisation):
            ranks = layout.within(Weight(torch.empty(0), target), self.value, whitened=self.whitened)
        if ranks is None:
            return None
        transform = LowRank(ranks=ranks, form=self.form, slices=self.slices, whitened=self.whitened, then=self.then)
        return transform.least_use(target)

    def resolve(self, weight: Weight) -> LowRank | None:
        """Return the transform with the layer's rank, or None if it saves nothing there."""
        if self.unfit(weight.target):
            return None
        self._require_moments(weight)
        layout = self.layout(weight.target)
        ranks: Ranks | None
        if self.by == "rank":
            ranks = (int(self.value),) * len(layout.largest(weight.target))
        else:
            find = layout.within if self.by == "ratio" else layout.keeping
            ranks = find(weight, self.value, whitened=self.whitened)
        if ranks is None:
            return None
        transform = LowRank(ranks=ranks, form=self.form, slices=self.slices, whitened=self.whitened, then=self.then)
        return None if transform.why_not(weight.target) else transform


def _whole(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise OptionsError(f"{name} must be a whole number from 1, found {value!r}") from error
    if number < 1 or isinstance(value, bool):
        hint = ": rank 0 would leave only the layer's bias" if name == "a rank" and number == 0 else ""
        raise OptionsError(f"{name} must be a whole number from 1, found {value!r}{hint}")
    return number


def _share(value: Any, name: str) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise OptionsError(f"the {name} must be a number above 0 and below 1, found {value!r}")
    return share
