"""Codes that are on offer beside channels: bits, and factors of a fixed rank.

A layer has them if its bytes, and with factors its multiply-accumulates, follow from its rows and columns (see
`qcompress.structure.coded`). A rank is that of the original's weight. It is on offer if every weight that removals may
leave has it; widths of the set whose decision includes the codes do not count, as combinations that do not fit are left
out (`qcompress.measuring.combinations`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from qcompress.errors import OptionsError
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.removals import Removals, kept_units
from qcompress.model.counting import Counted
from qcompress.model.parts import Part, weights_of
from qcompress.options import Options
from qcompress.structure.coded import USES, CodedLayer, coded_layers, use_form
from qcompress.structure.uses import macs_of_weights
from qcompress.transforms.base import Offer, Transform, Weight
from qcompress.transforms.channels import KeepChannels
from qcompress.transforms.column_blocks import MAX_INPUTS
from qcompress.transforms.low_rank.factors import LowRank, RankRule
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

RANKS = (LowRank, RankRule)
"""Options that replace a layer by factors."""

CODES = (PruneQuantize, GroupWise, *RANKS)
"""Options that can be offered together with channels."""

FORMLESS = "the bytes of its codes do not follow from the numbers of its channels"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """Layers whose codes are chosen together with channels.

    Attributes:
        layers: the layers.
        options: options of each layer, by name.
        reasons: name of each other layer with codes on offer → why it has no choice of codes.
        notes: why layers that have codes have none of the ranks on offer.
    """

    layers: tuple[CodedLayer, ...]
    options: dict[str, Options]
    reasons: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        removals: Removals,
        parts: Sequence[Part],
        offered: Mapping[str, Options],
        counted: Counted,
        needed: Mapping[str, str],
    ) -> "Coded":
        """Find the layers among ``parts`` whose uses follow from the numbers of units kept.

        Args:
            model: the model.
            removals: the removals on offer.
            parts: the parts of the model.
            offered: options by name of every part that codes are on offer for.
            counted: counts of the model's operations.
            needed: name of a part → why the network needs its layer itself.

        Raises:
            OptionsError: codes are on offer, but none for which that holds.
        """
        found, reasons = coded_layers(model, removals.sets, [part for part in parts if part.name in offered])
        whole = [layer.part for layer in found]
        weights = weights_of(model, whole, removals.moments, removals.num_inputs)
        macs, kept = macs_of_weights(model, counted), numbers_kept(removals)
        layers, options, notes = [], {}, []
        for layer, weight in zip(found, weights, strict=True):
            name = layer.part.name
            dense = _why_dense(layer, removals, macs, kept)
            fitting, no_ranks, no_codes = _fitting(layer, weight, offered[name].offers, kept, dense)
            if not fitting:
                reasons[name] = needed.get(name) or no_ranks or no_codes
                continue
            layers.append(layer)
            options[name] = Options(fitting)
            if (why := needed.get(name) or no_ranks) and not replaces(layer, fitting):
                notes.append(f"{name}: no ranks beside channels, {why}")
        if offered and not layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise OptionsError(f"no codes on offer can be chosen together with channels ({why})")
        return cls(layers=tuple(layers), options=options, reasons=reasons, notes=tuple(notes))


def codes_on_offer(parts: Sequence[Part], offered: Offered) -> dict[str, Options]:
    """Return the options by name of every part that codes are on offer for.

    Very wide layers, whose moments are known in blocks only, are rounded to nearest.
    """
    codes = {}
    for part in parts:
        if offered.left_out(part.path, part.modules[0]):
            continue
        offers = offered.options(part.path, part.modules[0]).offers
        options = Options(tuple(offer for offer in offers if not isinstance(offer, KeepChannels)))
        wide = part.target.layer != "Embedding" and part.target.per_channel > MAX_INPUTS
        if options.offers:
            codes[part.name] = options.uncalibrated() if wide else options
    return codes


def numbers_kept(removals: Removals) -> dict[int, list[int]]:
    """Index of a set → numbers of units that may stay."""
    pairs = zip(removals.sets, removals.transforms, strict=True)
    return {place: kept_units(item, options) for place, (item, options) in enumerate(pairs)}


def with_home_kept(layer: CodedLayer, kept: Mapping[int, Sequence[int]], number: int) -> dict[int, Sequence[int]]:
    """Return the numbers of units that may stay if ``number`` stay in the set whose decision includes the codes."""
    return {**kept, **({} if layer.home is None else {layer.home: [number]})}


def replaces(layer: CodedLayer, transforms: Sequence[Transform]) -> bool:
    """Whether one of a layer's transforms replaces it, so that its multiply-accumulates depend on the choice."""
    return any(transform.replaces_layer(layer.part.target) for transform in transforms)


def _why_dense(
    layer: CodedLayer, removals: Removals, macs: Mapping[str, float], kept: Mapping[int, Sequence[int]]
) -> str:
    """Return why factors of a layer would be miscounted, or an empty string."""
    name = layer.part.state_name
    if mixing := [item.name for item in removals.sets if name in item.mixed]:
        return f"its multiply-accumulates depend on the channels of {mixing[0]!r}, whose positions it mixes"
    if not math.isclose(macs.get(name, 0.0), layer.part.target.macs, rel_tol=1e-9):
        return "its weight is multiplied outside of its calls as well"
    return "several coupled sets together may leave nothing of it" if layer.may_vanish(kept) else ""


def _fitting(
    layer: CodedLayer, weight: Weight, offers: Sequence[Offer], kept: Mapping[int, Sequence[int]], dense: str
) -> tuple[tuple[Transform, ...], str, str]:
    """Return the transforms on offer, why ranks that fit without channels are not, and why other options are not.

    Args:
        layer: the layer.
        weight: its weight.
        offers: options on offer.
        kept: for every set (by index) the numbers of units that may stay.
        dense: why no factors are on offer, or an empty string.
    """
    found, no_ranks, no_codes = list[Transform](), "", ""
    at_home = kept if layer.home is None else with_home_kept(layer, kept, max(kept[layer.home]))
    for offer in offers:
        transform = offer.resolve(weight) if isinstance(offer, RANKS) else offer
        if not isinstance(transform, Transform):
            no_codes = no_codes or offer.unfit(weight.target) or "no rank on offer saves anything"
        elif not (why := _why_not(transform, layer, kept, at_home, dense)):
            found.append(transform)
        elif transform.replaces_layer(weight.target):
            no_ranks = no_ranks or why
        else:
            no_codes = no_codes or why
    return tuple(found), no_ranks, no_codes


def _why_not(
    transform: Transform,
    layer: CodedLayer,
    kept: Mapping[int, Sequence[int]],
    at_home: Mapping[int, Sequence[int]],
    dense: str,
) -> str:
    factored = transform.replaces_layer(layer.part.target)
    if why := (dense if factored else "") or layer.why_not(transform, at_home):
        return why
    names = USES if factored else ("bytes",)
    return FORMLESS if any(use_form(name, transform, layer, kept) is None for name in names) else ""
