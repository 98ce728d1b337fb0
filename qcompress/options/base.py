"""Options: the set of transforms that each part of a model may choose from, besides staying unchanged."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.options.kinds import offer_from_json
from qcompress.transforms.activations import Activations
from qcompress.transforms.base import Keep, Offer, Target, Transform, Weight
from qcompress.transforms.low_rank.factors import LowRank, RankRule
from qcompress.transforms.quantize.prune_quantize import PruneQuantize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A transform that is useful for a weight, and its result.

    Attributes:
        stored: arrays of the encoded weight as they would be written, many times smaller than its rows; empty for
            "keep".
        error: squared error of the decoded weight, see `Weight.relative_error`.
    """

    transform: Transform
    stored: dict[str, Tensor]
    error: float


@dataclass(frozen=True)
class Options:
    """Options for every weight. "Keep as it is" is always among them and not listed.

    >>> from qcompress import low_rank, prune_quantize
    >>> prune_quantize(bits=(4, 8), sparsity=(0,)) + low_rank(ratios=(0.25,))
    Options(4 bits; 8 bits; rank for 25 % of the weights, whitened; spatial rank for 25 % of the weights, whitened)
    >>> low_rank(ranks=(8,), whitened=False).then(prune_quantize(bits=(4,), sparsity=(0,)))
    Options(rank 8, 4 bits; spatial rank 8, 4 bits)
    """

    offers: tuple[Offer, ...]

    def __post_init__(self) -> None:
        wrong = [item for item in self.offers if not isinstance(item, Offer)]
        if wrong:
            raise OptionsError(f"options must be transforms, such as those of prune_quantize(); found {wrong[0]!r}")
        distinct = dict.fromkeys(item for item in self.offers if not isinstance(item, Keep))
        object.__setattr__(self, "offers", tuple(distinct))

    def __add__(self, other: "Options") -> "Options":
        if not isinstance(other, Options):
            return NotImplemented
        return Options(self.offers + other.offers)

    def __repr__(self) -> str:
        return f"Options({'; '.join(offer.label for offer in self.offers)})"

    def then(self, other: "Options") -> "Options":
        """Return every low-rank option here combined with every option of ``other``, applied to its factors.

        Args:
            other: options of `prune_quantize`.

        Raises:
            OptionsError: an option here is not low rank or already transforms its factors, or one of ``other`` is not
                from `prune_quantize`.
        """
        wrong = [
            offer.label
            for offer in self.offers
            if not (isinstance(offer, (LowRank, RankRule)) and offer.then == Keep())
        ]
        wrong += [offer.label for offer in other.offers if not isinstance(offer, PruneQuantize)]
        if wrong:
            raise OptionsError(f"only low_rank(…).then(prune_quantize(…)) can be composed, found {wrong[0]!r}")
        return Options(tuple(replace(first, then=second) for first in self.offers for second in other.offers))  # type: ignore[call-arg]

    def need_moments(self, target: Target) -> bool:
        """Whether any option needs the second moments of the layer's input to be fitted to ``target``."""
        return any(offer.needs_moments(target) for offer in self.offers)

    def uncalibrated(self) -> "Options":
        """Return uncalibrated options: weights rounded to nearest, and factors closest in plain squared error."""
        return Options(tuple(offer.uncalibrated for offer in self.offers))

    def calibrated_in_blocks(self, target: Target) -> "Options":
        """Return the options for second moments that are known in blocks of columns only.

        Options that need all moments are replaced by their uncalibrated versions: weights rounded to nearest, factors
        closest for all inputs alike.
        """
        taken = (offer if offer.takes_blocks(target) else offer.uncalibrated for offer in self.offers)
        return Options(tuple(dict.fromkeys(taken)))

    def need_squares(self, target: Target) -> bool:
        """Whether any option uses the mean squares of the layer's input columns at ``target``."""
        return any(offer.needs_squares(target) for offer in self.offers)

    def need_ranges(self, target: Target) -> bool:
        """Whether any option needs the ranges of the layer's activations to be fitted to ``target``."""
        return any(offer.needs_ranges(target) for offer in self.offers)

    def for_weight(self, weight: Weight) -> tuple[Fitted, ...]:
        """Return "keep" and every option that is useful for ``weight``, each encoded once.

        Within one kind, a transform is dropped when another one takes no more bytes, no more macs and has no larger
        squared error; of equal transforms the first stays. Transforms of different kinds, or with different rounding of
        activations, are never compared: equal squared errors of low rank and of rounding can do different harm.
        """
        useful: dict[tuple[str, Activations | None], list[tuple[int, float, Fitted]]] = {}
        for transform in dict.fromkeys(offer.resolve(weight) for offer in self.offers):
            if transform is None:
                continue
            stored = transform.encode(weight)
            error = weight.relative_error(transform.decode(stored, weight.target))
            size_bytes, macs = transform.size_bytes(weight.target), transform.macs(weight.target)
            new = Fitted(transform=transform, stored=stored, error=error)
            family = useful.setdefault((transform.kind, transform.activations), [])
            if not any(
                size <= size_bytes and often <= macs and other.error <= new.error for size, often, other in family
            ):
                family[:] = [
                    (size, often, other)
                    for size, often, other in family
                    if not (size_bytes <= size and macs <= often and new.error <= other.error)
                ]
                family.append((size_bytes, macs, new))
        fitted = tuple(each for family in useful.values() for _, _, each in family)
        return (Fitted(transform=Keep(), stored={}, error=0.0), *fitted)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the offers as plain JSON."""
        return [offer.to_json() for offer in self.offers]

    @classmethod
    def from_json(cls, value: Any) -> "Options":
        """Undo `to_json`.

        Raises:
            OptionsError: ``value`` is not a result of `to_json`.
        """
        if not isinstance(value, list):
            raise OptionsError(f"options are a list of transforms, found {type(value).__name__}")
        return cls(tuple(map(offer_from_json, value)))
