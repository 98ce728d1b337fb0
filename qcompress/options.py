"""Options: the set of transforms that each part of a model may choose from, besides staying unchanged."""

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
"""Entry point group with which another package adds a transform: its kind → ``module:Class``."""

KINDS: tuple[type[Offer], ...] = (
    Keep, PruneQuantize, GroupWise, IntegerProduct, PruneFilters, LowRank,
    RankRule, GgufType, KeepChannels, RemoveChannels,
)  # fmt: skip
OFFERS = {kind.kind: kind for kind in KINDS}


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
        """The same options without calibration: weights rounded to nearest, factors closest in plain squared error."""
        return Options(tuple(offer.uncalibrated for offer in self.offers))

    def calibrated_in_blocks(self, target: Target) -> "Options":
        """The same for moments of blocks of columns: without them where those will not do, rounded to nearest and with
        factors closest for all inputs alike.
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
        return cls(tuple(map(_from_json, value)))


def transform_from_json(value: Any) -> Transform:
    """Undo `Transform.to_json`.

    Raises:
        OptionsError: the kind is unknown, or the fields do not belong to it.

    >>> transform_from_json({"kind": "prune_quantize", "bits": 4, "sparsity": 0.5})
    PruneQuantize(bits=4, sparsity=0.5, compensated=False)
    """
    offer = _from_json(value)
    if not isinstance(offer, Transform):
        raise OptionsError(f"{offer.label!r} is a rule for any weight, not a transform of a single one")
    return offer


def _offer_class(kind: Any) -> type[Offer]:
    """Return the class of a kind, from `OFFERS` or from the entry point of another package.

    Raises:
        OptionsError: the kind is unknown; the message lists the known ones.
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
    return OptionsError(f"no transform has the kind {kind!r}; known: {', '.join(known)}")


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
        raise OptionsError(f"invalid fields for a {value['kind']} transform: {fields} ({error})") from error


SPARSITY, SPARSITY_IN_GROUPS = (0.0, 0.5, 0.75), (0.0,)
"""Default shares of the weights to prune; engines for grouped codes do not store which weights are pruned."""


def prune_quantize(
    bits: Iterable[int] = (2, 3, 4, 6, 8),
    sparsity: Iterable[float] | None = None,
    *,
    group_size: int | Iterable[int | None] | None = None,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    compensated: bool = False,
) -> Options:
    """Prune to each sparsity, then quantize to each number of bits in groups of each size: all combinations.

    Args:
        bits: numbers of bits, each from 2 to 16; at most 8 in groups, with zero points or with short scales.
        sparsity: shares of the weights to prune, each from 0 to below 1. The default is 0, 0.5 and 0.75 for whole rows,
            and 0 for groups, because engines for grouped codes do not store which weights are pruned.
        group_size: number of weights of a row that share a scale, for example 32 or (32, 128); None for whole rows.
        symmetric: False to use zero points, so that a group's codes span exactly the range of its weights.
        scale_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``. The default is float32 for whole rows without zero
            points; otherwise bfloat16 for bfloat16 weights and float16 for all others.
        compensated: whether the remaining weights are adjusted to compensate the error on the calibration inputs (in
            Linear layers and all kinds of convolutions): the same bytes at a fraction of the loss. `measure` then
            stores ``(in, in)`` second moments of each such layer (for a convolution, of the unfolded input; for a
            grouped convolution, of each group's unfolded input).

    Raises:
        OptionsError: a list is empty or a value is outside its range.

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
    """Low-rank factors in place of Linear and ungrouped Conv2d layers: every kind at every rank.

    Args:
        ratios: shares of the number of weights, above 0 and below 1; each gives the largest rank whose factors fit into
            it. The default, if neither ranks nor energies are given, is one eighth to six eighths.
        ranks: ranks, from 1.
        energies: shares of the weight's squared norm, above 0 and below 1; each gives the smallest rank that retains
            it. The rank depends on the weight; the option that is measured, solved for and saved states it.
        kinds: ``"channels"``: the weight as ``(out, in)`` matrix; ``"spatial"``: a column, then a row of a kernel;
            ``"tucker"``: 1×1, kernel, 1×1; ``"sliced"``: a rank for each slice of the input channels. Linear layers
            support "channels" and "sliced" only.
        slices: numbers of slices, for ``"sliced"``.
        whitened: whether the factors are closest on the calibration inputs; False weighs all inputs alike. If True,
            `measure` stores ``(in, in)`` second moments of each such layer (for a convolution, of the unfolded input).

    Ranks that save neither bytes nor macs in a layer are not offered there. ``low_rank(…).then(prune_quantize(…))``
    prunes and quantizes the factors.

    Raises:
        OptionsError: a list is empty or a value is outside its range.

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
    """Weights and activations in 8 bits (W8A8), multiplied as integers where an engine has kernels for that.

    Weights are stored in 8 bits by row. The input of a Linear layer or convolution is rounded to 8 bits at run time,
    and so is the output of a convolution; fold batch norms first (`fold_batch_norms`), so that this output is what the
    next layer reads. The rounding is included in the measured loss of the option and in the model that `apply` returns.

    Args:
        ranges: ``"static"`` for ranges from the calibration data, ``"dynamic"`` for the range of each tensor at run
            time (Linear layers only; all samples of a batch then share one range).
        compensated: same as in `prune_quantize`, for the weights.

    Raises:
        OptionsError: the list is empty, or contains another word.

    >>> integer_products()
    Options(8 bits, activations in 8 bits; 8 bits, activations in 8 bits, dynamic)
    """
    words = _listed(ranges, "ranges", "('static', 'dynamic')")
    if wrong := [word for word in words if word not in RANGES]:
        raise OptionsError(f"ranges are {' and '.join(map(repr, RANGES))}, found {wrong[0]!r}")
    return Options(tuple(IntegerProduct(dynamic=word == "dynamic", compensated=compensated) for word in words))


RARE_TYPES = ("F32", "BF16", "IQ1_M", "IQ1_S")


def gguf_types(names: Iterable[str] | None = None, *, compensated: bool = False) -> Options:
    """Tensor types of ggml, encoded by ggml itself, as run by llama.cpp.

    `measure` collects the mean squares of the layers' inputs, which weigh the columns like llama.cpp's importance
    matrix. If the row length is not a multiple of a type's block, the type that llama.cpp falls back to is offered.

    Args:
        names: type names, such as ``("Q4_K", "Q6_K")``; by default F16 and all quantized types down to 2 bits.
        compensated: whether codes, scales and offsets are adjusted to compensate each other's errors on the calibration
            inputs, in the same bytes. This covers all types except F16, BF16 and those of 1 to 3 bits whose names begin
            with IQ, which stay as ggml encodes them. llama.cpp needs no change. `measure` then stores ``(in, in)``
            second moments of each such layer; for an embedding tied to the output layer, those of the latter's input.

    Raises:
        OptionsError: the list is empty, or a type does not exist; the message lists the known ones.

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
    """Remove channels, heads and gated units with everything that belongs to them, leaving a smaller dense network.

    Args:
        keep: shares of the channels of a coupled set to keep, each above 0 and below 1.
        granularity: number of channels that are removed together; the number that stays is a multiple of it.
        scores: order in which channels are removed. ``"obs"``: by the loss that remains after the other channels
            compensate, one channel after another; ``"fisher"``: by the linearised change of the outputs; ``"l1"``: by
            the mean absolute weight.
        reconstructed: whether the layers that read a set are refitted to the remaining channels, by least squares on
            the calibration data. `measure` then stores ``(in, in)`` second moments of each of them.

    Raises:
        OptionsError: a list is empty or a value is outside its range.

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
