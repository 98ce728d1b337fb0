"""What is on offer: a set of transforms that every part of a model may choose from, besides being kept as it is."""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.scalars import plain
from qcompress.transforms.activations import Activations
from qcompress.transforms.base import Keep, Offer, Target, Transform, Weight
from qcompress.transforms.channels import KeepChannels, RemoveChannels
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import TYPES
from qcompress.transforms.low_rank.factors import LowRank, RankRule
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from qcompress.transforms.quantize.whole_filters import PruneFilters

ENTRY_POINTS = "qcompress.transforms"
"""Group of the entry points by which a package of its own adds a transform: its kind → ``module:Class``."""

KINDS: tuple[type[Offer], ...] = (
    Keep, PruneQuantize, GroupWise, IntegerProduct, PruneFilters, LowRank,
    RankRule, GgufType, KeepChannels, RemoveChannels,
)  # fmt: skip
OFFERS = {kind.kind: kind for kind in KINDS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A transform that is of use for a weight, and what it makes of it.

    Attributes:
        stored: the arrays of the weight as they would be written, many times smaller than the rows they stand for;
            none when it is kept.
        error: its squared error, see `Weight.relative_error`.
    """

    transform: Transform
    stored: dict[str, Tensor]
    error: float


@dataclass(frozen=True)
class Options:
    """What is on offer for every weight; "keep as it is" is always among it and not listed.

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
        """Each of these low-rank options with each of the others done to its factors.

        Args:
            other: `prune_quantize` options.

        Raises:
            OptionsError: these are not all low rank with factors as they are, or the others not all pruning and
                quantization.
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
        """Whether something on offer takes the moments of the layer's input to fit there."""
        return any(offer.needs_moments(target) for offer in self.offers)

    def uncalibrated(self) -> "Options":
        """The same without what needs moments: rounded to nearest, factors closest for all inputs alike."""
        return Options(tuple(offer.uncalibrated for offer in self.offers))

    def need_squares(self, target: Target) -> bool:
        """Whether something on offer takes the mean squares of the layer's input columns into account there."""
        return any(offer.needs_squares(target) for offer in self.offers)

    def need_ranges(self, target: Target) -> bool:
        """Whether something on offer takes the ranges of the layer's activations to fit there."""
        return any(offer.needs_ranges(target) for offer in self.offers)

    def for_weight(self, weight: Weight) -> tuple[Fitted, ...]:
        """Keep, then what fits ``weight`` and is of use for it, each worked out once.

        Of one kind, a transform is of no use when another one takes no more bytes and no more macs and has no larger
        squared error (of equal ones the first stays). Across kinds, and roundings of activations, it may be: an error
        of low rank and one of rounding can do different harm at the same square.
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

    def for_target(self, target: Target, rows: Tensor) -> tuple[Transform, ...]:
        """The transforms of `for_weight`, for rows without calibration."""
        return tuple(offer.transform for offer in self.for_weight(Weight(rows, target)))

    def to_json(self) -> list[dict[str, Any]]:
        """The offers as plain JSON."""
        return [offer.to_json() for offer in self.offers]

    @classmethod
    def from_json(cls, value: Any) -> "Options":
        """Undo `to_json`.

        Raises:
            OptionsError: it is not what `to_json` gives.
        """
        if not isinstance(value, list):
            raise OptionsError(f"options are a list of transforms, found {type(value).__name__}")
        return cls(tuple(map(_from_json, value)))


def transform_from_json(value: Any) -> Transform:
    """Undo `Transform.to_json`.

    Raises:
        OptionsError: an unknown kind, or fields that do not belong to it.

    >>> transform_from_json({"kind": "prune_quantize", "bits": 4, "sparsity": 0.5})
    PruneQuantize(bits=4, sparsity=0.5, compensated=False)
    """
    offer = _from_json(value)
    if not isinstance(offer, Transform):
        raise OptionsError(f"{offer.label!r} is an offer for any weight, not the transform of one")
    return offer


def _offer_class(kind: Any) -> type[Offer]:
    """The class of a kind: one of `OFFERS`, or one that a package of its own names as an entry point.

    Raises:
        OptionsError: there is none; lists the known ones.
    """
    if isinstance(kind, str) and kind in OFFERS:
        return OFFERS[kind]
    points = [point for point in importlib.metadata.entry_points(group=ENTRY_POINTS) if point.name == kind]
    if not points:
        raise _unknown(kind)
    offer_class: type[Offer] = points[0].load()
    return offer_class


def _unknown(kind: Any) -> OptionsError:
    known = [*OFFERS, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))]
    return OptionsError(f"no transform is of the kind {kind!r}; known: {', '.join(known)}")


def _from_json(value: Any) -> Offer:
    if not isinstance(value, dict):
        raise _unknown(value)
    offer_class = _offer_class(value.get("kind"))
    fields = {
        name: _from_json(item) if isinstance(item, dict) else item for name, item in value.items() if name != "kind"
    }
    try:
        return offer_class(**fields)
    except TypeError as error:
        raise OptionsError(f"not the fields of a {value['kind']} transform: {fields} ({error})") from error


SPARSITY, SPARSITY_IN_GROUPS = (0.0, 0.5, 0.75), (0.0,)
"""Shares of the weights to prune by default; engines of grouped codes do not store which weights are pruned."""


def prune_quantize(
    bits: Iterable[int] = (2, 3, 4, 6, 8),
    sparsity: Iterable[float] | None = None,
    *,
    group_size: int | Iterable[int | None] | None = None,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    compensated: bool = False,
) -> Options:
    """Pruning to each sparsity, then quantization to each number of bits in groups of each size: all combinations.

    Args:
        bits: 2 to 16 each; in groups, with zero points or short scales to 8.
        sparsity: share of the weights to prune, from 0 to below 1 each; by default none, a half and three quarters of
            whole rows, and none in groups, where engines do not store which weights are pruned.
        group_size: weights of a row that share a scale, as 32 or (32, 128); None for whole rows.
        symmetric: False for zero points: a group's codes then reach as far up and down as its weights do.
        scale_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``; by default float32 for whole rows without zero
            points, else bfloat16 for bfloat16 weights and float16 for others.
        compensated: whether what is kept makes up for what is lost, for the inputs that the calibration data gives (in
            Linear layers and convolutions of all kinds): in the same bytes, a fraction of the loss. `measure` then
            keeps ``(in, in)`` second moments of each such layer (for a convolution of the unfolded input, for one in
            groups of each group's).

    Raises:
        OptionsError: an empty list or a value outside its range.

    >>> prune_quantize(bits=(2, 4), sparsity=(0, 0.5))
    Options(2 bits; 4 bits; 2 bits, 50 % sparse; 4 bits, 50 % sparse)
    >>> prune_quantize(bits=(4,), group_size=(32, 128), symmetric=False)
    Options(4 bits in groups of 32, asymmetric; 4 bits in groups of 128, asymmetric)
    """
    all_bits = _listed(bits, "bits", "(2, 4, 8)")
    sizes = _listed(group_size, "group_size", "(32, 128)") if isinstance(group_size, Iterable) else [group_size]
    given = None if sparsity is None else _listed(sparsity, "sparsity", "(0, 0.5)")
    offers: list[Offer] = []
    for size in sizes:
        shares = given or (SPARSITY if size is None else SPARSITY_IN_GROUPS)
        each = [(count, share, compensated) for share in shares for count in all_bits]
        if size is None and symmetric is True and scale_dtype in (None, "float32"):
            offers += [PruneQuantize(*values) for values in each]
        else:
            offers += [
                GroupWise(*values, group_size=size, symmetric=symmetric, scale_dtype=scale_dtype) for values in each
            ]
    return Options(tuple(offers))


def low_rank(
    ratios: Iterable[float] | None = None,
    *,
    ranks: Iterable[int] | None = None,
    energies: Iterable[float] | None = None,
    kinds: Iterable[str] = ("channels", "spatial"),
    slices: Iterable[int] = (2, 4),
    whitened: bool = True,
) -> Options:
    """Low-rank factors in the place of Linear and ungrouped Conv2d layers: every kind at every rank.

    Args:
        ratios: shares of the weights, above 0 and below 1: the largest rank whose factors fit in. The default, where
            neither ranks nor energies are given, is an eighth to six eighths.
        ranks: from 1.
        energies: shares of the weight's squared norm, above 0 and below 1: the smallest rank that keeps them. The rank
            depends on the weight; the option that is measured, solved for and saved names it.
        kinds: ``"channels"``: the weight as ``(out, in)`` matrix; ``"spatial"``: a column, then a row of a kernel;
            ``"tucker"``: 1×1, kernel, 1×1; ``"sliced"``: a rank for each slice of the input channels. A Linear layer
            takes "channels" and "sliced" only.
        slices: how many, for ``"sliced"``.
        whitened: closest for the inputs that the calibration data gives; False for all inputs alike. `measure`
            keeps ``(in, in)`` second moments of each such layer (for a convolution of the unfolded input).

    Ranks that save neither bytes nor macs in a layer are not offered there. ``low_rank(…).then(prune_quantize(…))``
    prunes and quantizes the factors.

    Raises:
        OptionsError: an empty list or a value outside its range.

    >>> low_rank(ratios=(0.25, 0.5), kinds=("channels",))
    Options(rank for 25 % of the weights, whitened; rank for 50 % of the weights, whitened)
    >>> low_rank(energies=(0.9,), kinds=("spatial", "sliced"), slices=(2,), whitened=False)
    Options(spatial rank for 90 % of the energy; 2 slices rank for 90 % of the energy)
    """
    if ratios is None and ranks is None and energies is None:
        ratios = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    given = {"ratio": ("ratios", ratios, "(0.25, 0.5)"), "rank": ("ranks", ranks, "(8, 16)")}
    given["energy"] = ("energies", energies, "(0.9, 0.99)")
    rules = [(by, value) for by, (name, values, example) in given.items() if values is not None
             for value in _listed(values, name, example)]  # fmt: skip
    counts = _listed(slices, "slices", "(2, 4)")
    forms = [(kind, count) for kind in _listed(kinds, "kinds", "('channels', 'spatial')")
             for count in (counts if kind == "sliced" else [1])]  # fmt: skip
    return Options(
        tuple(
            RankRule(by=by, value=value, form=form, slices=count, whitened=whitened)
            for form, count in forms
            for by, value in rules
        )
    )


RANGES = ("static", "dynamic")


def integer_products(ranges: Iterable[str] = RANGES, *, compensated: bool = False) -> Options:
    """Weights and activations in 8 bits (W8A8), multiplied as integers, where an engine has kernels for that.

    Weights are in 8 bits by row; what goes into a Linear layer or a convolution is rounded to 8 bits when it runs, and
    what a convolution gives as well: fold batch norms first (`fold_batch_norms`), so that this is what the next layer
    reads. The rounding is a part of the option's measured loss, and of the compressed model that `apply` gives.

    Args:
        ranges: ``"static"``, found on the calibration data, and ``"dynamic"``, that of every tensor as it comes (of
            Linear layers only; a batch then rounds together).
        compensated: as of `prune_quantize`, for the weights.

    Raises:
        OptionsError: an empty list, or another word.

    >>> integer_products()
    Options(8 bits, activations in 8 bits; 8 bits, activations in 8 bits, dynamic)
    """
    words = _listed(ranges, "ranges", "('static', 'dynamic')")
    if wrong := [word for word in words if word not in RANGES]:
        raise OptionsError(f"ranges are {' and '.join(map(repr, RANGES))}, found {wrong[0]!r}")
    return Options(tuple(IntegerProduct(dynamic=word == "dynamic", compensated=compensated) for word in words))


RARE_TYPES = ("F32", "BF16", "IQ1_M", "IQ1_S")


def gguf_types(names: Iterable[str] | None = None, *, compensated: bool = False) -> Options:
    """Tensor types of ggml, encoded by ggml itself, as llama.cpp runs them.

    `measure` collects the mean squares of the layers' inputs, by which columns count, as llama.cpp's importance matrix.
    Where rows are no multiple of a type's block, the type that llama.cpp falls back to is on offer instead.

    Args:
        names: of types, as in ``("Q4_K", "Q6_K")``; by default F16 and all that are quantized, to 2 bits.
        compensated: whether codes, scales and offsets make up for each other's errors on the inputs that the
            calibration data gives, in the same bytes: of all types but F16, BF16 and those of 1 to 3 bits whose names
            begin with IQ, which stay as ggml encodes them. llama.cpp reads them as any. `measure` then keeps
            ``(in, in)`` second moments of each such layer, of a vocabulary that is the output layer too those of that
            layer's input.

    Raises:
        OptionsError: an empty list, or no such type; lists the known ones.

    >>> gguf_types(("Q4_K", "Q8_0"))
    Options(Q4_K; Q8_0)
    """
    if names is None:
        names = [name for name in TYPES if name not in RARE_TYPES]
    return Options(tuple(GgufType(name, compensated) for name in _listed(names, "names", "('Q4_K', 'Q6_K')")))


def prune_channels(
    keep: Iterable[float] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
    *,
    granularity: int = 1,
    scores: str = "obs",
    reconstructed: bool = True,
) -> Options:
    """Channels, heads and gated units removed with all that belongs to them: the result is a smaller dense network.

    Args:
        keep: shares of the channels of a coupled set that may stay, above 0 and below 1 each.
        granularity: channels that go together: what stays is a multiple of it.
        scores: in which order channels go. ``"obs"``: by what is lost when the others make up for them, one after the
            other; ``"fisher"``: by the linearised change of the outputs; ``"l1"``: by their mean absolute weights.
        reconstructed: whether the layers that read a set are fitted anew to what stays, by least squares on the
            calibration data. `measure` then keeps ``(in, in)`` second moments of each of them.

    Raises:
        OptionsError: an empty list or a value outside its range.

    >>> prune_channels(keep=(0.75, 0.5))
    Options(75 % of the channels; 50 % of the channels)
    """
    shares = _listed(keep, "keep", "(0.75, 0.5)")
    return Options(tuple(KeepChannels(plain(share), plain(granularity), scores, reconstructed) for share in shares))


def _listed(values: Any, name: str, example: str) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise OptionsError(f"{name} must be a list, such as {example}, found {values!r}")
    listed = list(values)
    if not listed:
        raise OptionsError(f"{name} is empty: give at least one, for example {example}")
    return listed
