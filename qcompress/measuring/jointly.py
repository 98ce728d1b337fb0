"""Channels and codes as options of one problem.

Removals and codes are measured one by one. Where the bytes of a layer depend on two sets (see
`qcompress.structure.coded`), the options of one set are combinations of a width with codes. Their cost is the sum of
the measured costs and the pair terms between them, as `qcompress.formulation` takes them between parts.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from torch import nn

from qcompress.errors import OptionsError
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.pair_terms import PAIR_STRENGTH, consistent_rows
from qcompress.measuring.removals import Removals, kept_units
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.structure.coded import CodedLayer, SizeForm, coded_layers, size_addends, size_form
from qcompress.structure.tabulated import Function, Tabulated
from qcompress.structure.uses import Uses
from qcompress.transforms.base import Transform
from qcompress.transforms.channels import Jointly, KeepChannels
from qcompress.transforms.column_blocks import MAX_INPUTS

MAX_OPTIONS = 1024
"""Largest number of combinations of one decision; beyond it, its layers share their codes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """Layers whose codes are chosen together with channels.

    Attributes:
        layers: the layers.
        options: options of each layer, by name.
        reasons: name of each other layer with codes on offer → why it has no choice of codes.
    """

    layers: tuple[CodedLayer, ...]
    options: dict[str, Options]
    reasons: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, removals: Removals, parts: Sequence[Part], offered: Mapping[str, Options]) -> "Coded":
        """Find the layers among ``parts`` whose bytes follow from the numbers of units kept.

        Raises:
            OptionsError: codes are on offer, but none for which that holds.
        """
        found, reasons = coded_layers(model, removals.sets, [part for part in parts if part.name in offered])
        kept = numbers_kept(removals)
        layers, options = [], {}
        for layer in found:
            name = layer.part.name
            fitting = [offer for offer in offered[name].offers
                       if isinstance(offer, Transform) and size_form(offer, layer, kept) is not None]  # fmt: skip
            if fitting:
                layers.append(layer)
                options[name] = Options(tuple(fitting))
            else:
                reasons[name] = "the bytes of its codes do not follow from the numbers of its channels"
        if offered and not layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise OptionsError(f"no codes on offer can be chosen together with channels ({why})")
        return cls(layers=tuple(layers), options=options, reasons=reasons)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joined:
    """The tables of a measurement whose options are combinations of those that were measured.

    Attributes:
        parts: the decisions.
        transforms: options of each.
        cost: ``(V,)`` costs.
        factor: ``(V, r)`` rows whose products are the pair terms.
        uses: name of a resource → constant, ``(V,)`` linear and ``(V, V)`` pair part.
    """

    parts: tuple[Part, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    cost: NDArray[np.float64]
    factor: NDArray[np.float64]
    uses: dict[str, tuple[float, NDArray[np.float64], scipy.sparse.csr_array]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decision:
    """A decision as combinations of measured options.

    Attributes:
        set_index: index of the set whose width it includes, or None.
        layers: indices of the layers whose codes it includes.
        rows: ``(options, 1 or 0 + layers)`` option of the set, then of every layer.
    """

    set_index: int | None
    layers: tuple[int, ...]
    rows: NDArray[np.int64]

    def of_set(self) -> NDArray[np.int64]:
        """Return ``(options,)`` option of the set."""
        return self.rows[:, 0]

    def of_layer(self, layer: int) -> NDArray[np.int64]:
        """Return ``(options,)`` option of a layer."""
        return self.rows[:, self.layers.index(layer) + (self.set_index is not None)]


def join(
    removals: Removals,
    coded: Sequence[CodedLayer],
    measured: tuple[Part, ...],
    transforms: Sequence[tuple[Transform, ...]],
    uses: Uses,
    cost: NDArray[np.float64],
    factor: NDArray[np.float64],
) -> Joined:
    """Combine measured removals and codes into decisions.

    Args:
        removals: the removals.
        coded: the layers with codes.
        measured: parts that were measured: the sets, then the layers.
        transforms: options of each measured part.
        uses: uses of everything but the coded layers' weights.
        cost: ``(V,)`` measured costs of the single options.
        factor: ``(V, r)`` their measured factor.
    """
    num_sets, codes = len(removals.sets), transforms[len(removals.sets) :]
    decisions = _decisions(removals, coded, codes)
    offsets = np.cumsum([0, *map(len, transforms)])
    flat = [
        decision.rows + [offsets[place] for place in _measured_places(decision, num_sets)] for decision in decisions
    ]
    parts, combined = [], []
    for decision in decisions:
        if decision.set_index is None:
            (layer,) = decision.layers
            parts.append(measured[num_sets + layer])
            combined.append(codes[layer])
        else:
            parts.append(measured[decision.set_index])
            combined.append(tuple(_combination(decision, row, removals, coded, codes) for row in decision.rows))
    rows = consistent_rows(factor, cost)
    return Joined(
        parts=tuple(parts),
        transforms=tuple(combined),
        cost=np.concatenate([_cost(chosen, cost, rows) for chosen in flat]),
        factor=np.concatenate([rows[chosen].sum(axis=1) for chosen in flat]) if coded else factor,
        uses=_uses(decisions, removals, coded, codes, uses),
    )


def _decisions(
    removals: Removals, coded: Sequence[CodedLayer], codes: Sequence[tuple[Transform, ...]]
) -> list[_Decision]:
    """Return a decision for every set, with the layers that belong to it, and one for every other layer."""
    decisions = []
    for place, options in enumerate(removals.transforms):
        layers = tuple(index for index, layer in enumerate(coded) if layer.home == place)
        sizes = [len(codes[layer]) for layer in layers]
        if len(options) * math.prod(sizes) <= MAX_OPTIONS:
            rows = list(itertools.product(range(len(options)), *map(range, sizes)))
        else:
            shared = [[min(number, size - 1) for size in sizes] for number in range(max(sizes))]
            rows = [(width, *numbers) for width in range(len(options)) for numbers in shared]
        decisions.append(_Decision(set_index=place, layers=layers, rows=np.array(rows, dtype=np.int64)))
    for index, layer in enumerate(coded):
        if layer.home is None:
            alone = np.arange(len(codes[index]), dtype=np.int64)[:, None]
            decisions.append(_Decision(set_index=None, layers=(index,), rows=alone))
    return decisions


def _measured_places(decision: _Decision, num_sets: int) -> list[int]:
    first = [] if decision.set_index is None else [decision.set_index]
    return [*first, *(num_sets + layer for layer in decision.layers)]


def _combination(
    decision: _Decision,
    row: NDArray[np.int64],
    removals: Removals,
    coded: Sequence[CodedLayer],
    codes: Sequence[tuple[Transform, ...]],
) -> Transform:
    assert decision.set_index is not None  # noqa: S101
    removal: Transform = removals.transforms[decision.set_index][row[0]]
    if not row[1:].any():
        return removal
    chosen = tuple(codes[layer][number] for layer, number in zip(decision.layers, row[1:], strict=True))
    return Jointly(removal, tuple(coded[layer].part.name for layer in decision.layers), chosen)


def _cost(chosen: NDArray[np.int64], cost: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``(options,)`` costs of combinations ``(options, measured options)``: sums and pair terms within."""
    before, together = np.zeros((len(chosen), rows.shape[1])), np.zeros(len(chosen))
    for member in chosen.T:  # squares of sums would lose the products of short rows next to a long one
        together += np.einsum("or,or->o", before, rows[member])
        before += rows[member]
    return np.asarray(cost[chosen].sum(axis=1) + PAIR_STRENGTH * together)


def _uses(
    decisions: Sequence[_Decision],
    removals: Removals,
    coded: Sequence[CodedLayer],
    codes: Sequence[tuple[Transform, ...]],
    uses: Uses,
) -> dict[str, tuple[float, NDArray[np.float64], scipy.sparse.csr_array]]:
    """Return the terms of every resource."""
    numbers = numbers_kept(removals)
    kept: list[Function] = [
        (place, np.array(numbers[place], dtype=np.float64)[decisions[place].of_set()]) for place in numbers
    ]
    deciding = {layer: index for index, decision in enumerate(decisions) for layer in decision.layers}
    tables = {}
    for name in ("bytes", "macs"):
        table = Tabulated([len(decision.rows) for decision in decisions])
        uses.tabulate(name, table, kept)
        for index, layer in enumerate(coded if name == "bytes" else ()):
            forms = [_form(transform, layer, numbers) for transform in codes[index]]
            choice = decisions[deciding[index]].of_layer(index)
            table.add(size_addends(layer, deciding[index], forms, choice.tolist(), kept))
        tables[name] = table.terms()
    return tables


def _form(transform: Transform, layer: CodedLayer, kept: Mapping[int, Sequence[int]]) -> SizeForm:
    """Return the bytes of a transform that is on offer, and therefore has a form."""
    form = size_form(transform, layer, kept)
    assert form is not None  # noqa: S101
    return form
