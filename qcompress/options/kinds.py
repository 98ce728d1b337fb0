"""Kinds of transforms: the table of those that exist here or in other packages, and transforms read from plain JSON."""

import importlib.metadata
from typing import Any

from qcompress.errors import OptionsError
from qcompress.transforms.base import Keep, Offer, Transform
from qcompress.transforms.channels import Jointly, KeepChannels, RemoveChannels
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.low_rank.factors import LowRank, RankRule
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from qcompress.transforms.quantize.whole_filters import PruneFilters

ENTRY_POINTS = "qcompress.transforms"
"""Entry point group with which another package adds a transform: its kind → ``module:Class``."""

KINDS: tuple[type[Offer], ...] = (
    Keep, PruneQuantize, GroupWise, IntegerProduct, PruneFilters, LowRank,
    RankRule, GgufType, KeepChannels, RemoveChannels, Jointly,
)  # fmt: skip
OFFERS = {kind.kind: kind for kind in KINDS}


def transform_from_json(value: Any) -> Transform:
    """Undo `Transform.to_json`.

    Raises:
        OptionsError: the kind is unknown, or the fields do not belong to it.

    >>> transform_from_json({"kind": "prune_quantize", "bits": 4, "sparsity": 0.5})
    PruneQuantize(bits=4, sparsity=0.5, compensated=False)
    """
    offer = offer_from_json(value)
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


def offer_from_json(value: Any) -> Offer:
    """Undo `Offer.to_json`, for a transform or a rule.

    Raises:
        OptionsError: the kind is unknown, or the fields do not belong to it.
    """
    if not isinstance(value, dict):
        raise _unknown(value)
    offer_class = _offer_class(value.get("kind"))
    fields = {name: _field_from_json(item) for name, item in value.items() if name != "kind"}
    try:
        return offer_class(**fields)
    except TypeError as error:
        raise OptionsError(f"invalid fields for a {value['kind']} transform: {fields} ({error})") from error


def _field_from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_field_from_json(item) for item in value]
    return offer_from_json(value) if isinstance(value, dict) else value
