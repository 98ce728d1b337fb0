"""Channels and codes as options of one problem.

Removals and codes are measured one by one. Where the uses of a layer depend on two sets (see
`qcompress.structure.coded`), the options of one set are combinations of a width with codes. Their cost is the sum of
the measured costs and the pair terms between them, as `qcompress.formulation` takes them between parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from qcompress.measuring.codes_beside import numbers_kept, replaces
from qcompress.measuring.combinations import Decision, decisions_on
from qcompress.measuring.pair_terms import PAIR_STRENGTH, consistent_rows
from qcompress.measuring.removals import Removals
from qcompress.model.parts import Part
from qcompress.structure.coded import USES, CodedLayer, UseForm, use_addends, use_form
from qcompress.structure.tabulated import Function, Tabulated
from qcompress.structure.uses import Uses
from qcompress.transforms.base import Transform
from qcompress.transforms.channels import Jointly


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joined:
    """The tables of a measurement whose options are combinations of those that were measured.

    Attributes:
        parts: the decisions.
        transforms: options of each.
        cost: ``(V,)`` costs.
        factor: ``(V, r)`` rows whose products are the pair terms.
        uses: name of a resource → constant, ``(V,)`` linear and ``(V, V)`` pair part.
        notes: which combinations of decisions are not on offer.
    """

    parts: tuple[Part, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    cost: NDArray[np.float64]
    factor: NDArray[np.float64]
    uses: dict[str, tuple[float, NDArray[np.float64], scipy.sparse.csr_array]]
    notes: tuple[str, ...]


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
        uses: uses of everything else: bytes of all but the coded layers' weights, multiply-accumulates of all but those
            layers that some of their codes replace.
        cost: ``(V,)`` measured costs of the single options.
        factor: ``(V, r)`` their measured factor.
    """
    num_sets, codes = len(removals.sets), transforms[len(removals.sets) :]
    offsets = np.cumsum([0, *map(len, transforms)])
    decisions = decisions_on(removals, coded, codes, np.split(cost, offsets[1:-1])[num_sets:])
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
        notes=tuple(
            f"{part.name}: {decision.left_out}"
            for part, decision in zip(parts, decisions, strict=True)
            if decision.left_out
        ),
    )


def _measured_places(decision: Decision, num_sets: int) -> list[int]:
    first = [] if decision.set_index is None else [decision.set_index]
    return [*first, *(num_sets + layer for layer in decision.layers)]


def _combination(
    decision: Decision,
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
    decisions: Sequence[Decision],
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
    for name in USES:
        table = Tabulated([len(decision.rows) for decision in decisions])
        uses.tabulate(name, table, kept)
        for index, layer in enumerate(coded):
            if name == "macs" and not replaces(layer, codes[index]):
                continue
            forms = [_form(name, transform, layer, numbers) for transform in codes[index]]
            choice = decisions[deciding[index]].of_layer(index)
            table.add(use_addends(layer, deciding[index], forms, choice.tolist(), kept))
        tables[name] = table.terms()
    return tables


def _form(name: str, transform: Transform, layer: CodedLayer, kept: Mapping[int, Sequence[int]]) -> UseForm:
    """Return a use of a transform that is on offer, and therefore has a form."""
    form = use_form(name, transform, layer, kept)
    assert form is not None  # noqa: S101
    return form
