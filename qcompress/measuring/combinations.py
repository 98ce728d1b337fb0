"""Decisions on channels and codes: which combinations of a width and codes a coupled set has.

All combinations of a width with codes that fit are options; if these are very many, codes are left out or shared (see
`qcompress.measuring.thinning`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompress.measuring.codes_beside import numbers_kept, with_home_kept
from qcompress.measuring.removals import Removals
from qcompress.measuring.thinning import chosen_codes
from qcompress.structure.coded import CodedLayer
from qcompress.transforms.base import Transform


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """A decision as combinations of measured options.

    Attributes:
        set_index: index of the set whose width it includes, or None.
        layers: indices of the layers whose codes it includes.
        rows: ``(options, 1 or 0 + layers)`` option of the set, then of every layer.
        left_out: which combinations are not among them, or an empty string.
    """

    set_index: int | None
    layers: tuple[int, ...]
    rows: NDArray[np.int64]
    left_out: str = ""

    def of_set(self) -> NDArray[np.int64]:
        """Return ``(options,)`` option of the set."""
        return self.rows[:, 0]

    def of_layer(self, layer: int) -> NDArray[np.int64]:
        """Return ``(options,)`` option of a layer."""
        return self.rows[:, self.layers.index(layer) + (self.set_index is not None)]


def decisions_on(
    removals: Removals,
    coded: Sequence[CodedLayer],
    codes: Sequence[tuple[Transform, ...]],
    costs: Sequence[NDArray[np.float64]],
) -> list[Decision]:
    """Return a decision for every set, with the layers that belong to it, and one for every other layer.

    Args:
        removals: the removals.
        coded: the layers with codes.
        codes: options of each layer.
        costs: measured costs of these options.
    """
    decisions, kept = [], numbers_kept(removals)
    for place in kept:
        layers = tuple(index for index, layer in enumerate(coded) if layer.home == place)
        taken = [_taken(coded[layer], codes[layer], kept, kept[place]) for layer in layers]
        chosen, left_out = chosen_codes(
            len(kept[place]),
            [coded[layer] for layer in layers],
            [codes[layer] for layer in layers],
            [costs[layer] for layer in layers],
        )
        rows = [
            (width, *(own[width, number] for own, number in zip(taken, numbers, strict=True)))
            for width in range(len(kept[place]))
            for numbers in chosen
        ]
        rows = [row for row in dict.fromkeys(rows) if min(row) >= 0]
        combined = np.array(rows, dtype=np.int64)
        decisions.append(Decision(set_index=place, layers=layers, rows=combined, left_out=left_out))
    for index, layer in enumerate(coded):
        if layer.home is None:
            alone = np.arange(len(codes[index]), dtype=np.int64)[:, None]
            decisions.append(Decision(set_index=None, layers=(index,), rows=alone))
    return decisions


def _taken(
    layer: CodedLayer, codes: Sequence[Transform], kept: Mapping[int, Sequence[int]], widths: Sequence[int]
) -> NDArray[np.int64]:
    """Return ``(widths, options)`` what an option means at a width of the set that the layer belongs to.

    That is itself, the first one if nothing is left of the layer, or -1 if it does not fit.
    """
    taken = np.zeros((len(widths), len(codes)), dtype=np.int64)
    for place, width in enumerate(widths):
        own = with_home_kept(layer, kept, width)
        if layer.shapes(own):
            taken[place] = [-1 if layer.why_not(code, own) else number for number, code in enumerate(codes)]
    return taken
