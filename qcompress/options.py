"""What is on offer: a set of transforms that every part of a model may choose from, besides being kept as it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.filters import PruneFilters
from qcompress.transforms.low_rank import LowRank
from qcompress.transforms.quantize import PruneQuantize

TRANSFORMS: dict[str, type[Transform]] = {kind.kind: kind for kind in (Keep, PruneQuantize, PruneFilters, LowRank)}


@dataclass(frozen=True)
class Options:
    """Transforms on offer; "keep as it is" is always among them and not listed.

    >>> prune_quantize(bits=(4, 8), sparsity=(0,)) + low_rank(ratios=(0.25,))
    Options(4 bits; 8 bits; rank for 25 %)
    """

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        wrong = [item for item in self.transforms if not isinstance(item, Transform)]
        if wrong:
            raise OptionsError(f"options are transforms, as prune_quantize() makes them; found {wrong[0]!r}")
        distinct = dict.fromkeys(item for item in self.transforms if not isinstance(item, Keep))
        object.__setattr__(self, "transforms", tuple(distinct))

    def __add__(self, other: "Options") -> "Options":
        if not isinstance(other, Options):
            return NotImplemented
        return Options(self.transforms + other.transforms)

    def __repr__(self) -> str:
        return f"Options({'; '.join(transform.label for transform in self.transforms)})"

    def for_target(self, target: Target, rows: Tensor) -> tuple[Transform, ...]:
        """Keep, then the transforms that fit ``target`` and are of use for its weight.

        Of one kind and with equal macs, a transform is of no use when another one takes no more bytes and has no
        larger squared error (of equal ones the first stays).

        Args:
            target: what is to be stored.
            rows: its weight, ``(channels, per_channel)``.
        """
        families: dict[tuple[str, float], list[tuple[int, float, int]]] = {}
        for place, transform in enumerate(self.transforms):
            if not transform.why_not(target):
                error = float((transform.approximate(rows, target).double() - rows.cpu().double()).square().sum())
                family = families.setdefault((transform.kind, transform.macs(target)), [])
                family.append((transform.size_bytes(target), error, place))
        useful = []
        for family in families.values():
            least = float("inf")
            for _, error, place in sorted(family):
                if error < least:
                    least = error
                    useful.append(place)
        return (Keep(), *(self.transforms[place] for place in sorted(useful)))

    def to_json(self) -> list[dict[str, Any]]:
        """The transforms as plain JSON."""
        return [transform.to_json() for transform in self.transforms]

    @classmethod
    def from_json(cls, value: Any) -> "Options":
        """Undo `to_json`.

        Raises:
            OptionsError: it is not what `to_json` gives.
        """
        if not isinstance(value, list):
            raise OptionsError(f"options are a list of transforms, found {type(value).__name__}")
        return cls(tuple(map(transform_from_json, value)))


def transform_from_json(value: Any) -> Transform:
    """Undo `Transform.to_json`.

    Raises:
        OptionsError: an unknown kind, or fields that do not belong to it.

    >>> transform_from_json({"kind": "prune_quantize", "bits": 4, "sparsity": 0.5})
    PruneQuantize(bits=4, sparsity=0.5)
    """
    if not isinstance(value, dict) or value.get("kind") not in TRANSFORMS:
        found = value.get("kind") if isinstance(value, dict) else value
        raise OptionsError(f"no transform is of the kind {found!r}; known are: {', '.join(TRANSFORMS)}")
    fields = {name: item for name, item in value.items() if name != "kind"}
    try:
        return TRANSFORMS[value["kind"]](**fields)
    except TypeError as error:
        raise OptionsError(f"not the fields of a {value['kind']} transform: {fields} ({error})") from error


def prune_quantize(bits: Iterable[int] = (2, 3, 4, 6, 8), sparsity: Iterable[float] = (0.0, 0.5, 0.75)) -> Options:
    """Pruning to each sparsity, then quantization to each number of bits: all combinations.

    Args:
        bits: 2 to 16 each.
        sparsity: share of the weights to prune, from 0 to below 1 each.

    Raises:
        OptionsError: an empty list or a value outside its range.

    >>> prune_quantize(bits=(2, 4), sparsity=(0, 0.5))
    Options(2 bits; 4 bits; 2 bits, 50 % sparse; 4 bits, 50 % sparse)
    """
    all_bits = _listed(bits, "bits", "(2, 4, 8)")
    shares = _listed(sparsity, "sparsity", "(0, 0.5)")
    return Options(tuple(PruneQuantize(count, share) for share in shares for count in all_bits))


def low_rank(ratios: Iterable[float] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)) -> Options:
    """Low-rank factors of Linear and Conv2d layers that hold about each share of the weights.

    Args:
        ratios: above 0 and below 1 each.

    Raises:
        OptionsError: an empty list or a value outside its range.

    >>> low_rank(ratios=(0.25, 0.5))
    Options(rank for 25 %; rank for 50 %)
    """
    return Options(tuple(LowRank(ratio) for ratio in _listed(ratios, "ratios", "(0.25, 0.5)")))


def _listed(values: Any, name: str, example: str) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise OptionsError(f"{name} must be a list of numbers, as {example}, found {values!r}")
    listed = list(values)
    if not listed:
        raise OptionsError(f"{name} is empty: give at least one number, as {example}")
    return listed
