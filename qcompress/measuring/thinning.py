"""Which codes of a decision's layers are combined, so that the combinations are not too many.

Up to `MAX_OPTIONS`, all are. Beyond it, ranks are combined only where they pay: for a grid of prices of bytes and
multiply-accumulates, the codes are taken that minimise the cost of every layer plus the price of what it uses. The
codes that use the least are added, as a budget may need them. Ranks that are often among the first are combined with
everything else as far as there is room. If there are too many combinations
even without ranks, the layers of the decision share their codes beside these: all take the first, all the second, and
so on.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qcompress.structure.coded import USES, CodedLayer
from qcompress.transforms.base import Transform

MAX_OPTIONS = 1024
"""Largest number of combinations of one decision for which its layers choose their codes independently."""

PRICES = np.concatenate([[0.0], np.logspace(-6, 2, 33)])
"""Prices of the largest use of a layer, in units of the largest cost, at which options are compared."""


def chosen_codes(
    num_widths: int,
    layers: Sequence[CodedLayer],
    codes: Sequence[Sequence[Transform]],
    costs: Sequence[NDArray[np.float64]],
) -> tuple[list[tuple[int, ...]], str]:
    """Return combinations of the options of a decision's layers, and which are left out, if any are.

    Args:
        num_widths: number of widths, at all of which the combinations are offered.
        layers: the layers.
        codes: options of each layer.
        costs: measured costs of these options.
    """
    total = math.prod(map(len, codes))
    if total == 1 or num_widths * total <= MAX_OPTIONS:
        return list(itertools.product(*(range(len(own)) for own in codes))), ""
    room = max(MAX_OPTIONS // num_widths, 1)
    tables = _tables(layers, codes, costs)
    best = [combination for combination, _ in Counter(_best_at_prices(tables)).most_common(room)]
    bits = [
        [number for number, code in enumerate(own) if not code.replaces_layer(layer.part.target)]
        for own, layer in zip(codes, layers, strict=True)
    ]
    often = [[number for number, _ in Counter(own).most_common()] for own in zip(*best, strict=True)]
    ranks = [[number for number in own if number not in others] for own, others in zip(often, bits, strict=True)]
    for most in range(max(map(len, ranks)), -1, -1):
        taken = [[*others, *own[:most]] for others, own in zip(bits, ranks, strict=True)]
        if num_widths * math.prod(map(len, taken)) <= MAX_OPTIONS:
            first, kind = list(itertools.product(*taken)), "all without ranks"
            break
    else:
        turns = range(max(map(len, bits)))
        first, kind = (
            [tuple(own[min(turn, len(own) - 1)] for own in bits) for turn in turns],
            "those alike in all layers",
        )
    chosen = list(dict.fromkeys([*first, *_of_least_use(tables), *best]))
    offered = f"{kind} and the best at some prices and in use are on offer"
    left_out = f"of {total:,} combinations of codes at each width, {offered}"
    return chosen, left_out if len(chosen) < total else ""


def _tables(
    layers: Sequence[CodedLayer], codes: Sequence[Sequence[Transform]], costs: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Return ``(1 + uses, options)`` for each layer: the cost and the uses of its options."""
    return [
        np.array([cost, *([use(code, layer.part.target) for code in own] for use in USES.values())], dtype=np.float64)
        for layer, own, cost in zip(layers, codes, costs, strict=True)
    ]


def _of_least_use(tables: Sequence[NDArray[np.float64]]) -> list[tuple[int, ...]]:
    """Return the combination of least use for each resource; of equal uses that of least cost."""
    return [
        tuple(int(np.lexsort((table[0], table[place]))[0]) for table in tables) for place in range(1, 1 + len(USES))
    ]


def _best_at_prices(tables: Sequence[NDArray[np.float64]]) -> list[tuple[int, ...]]:
    largest = np.maximum(np.max([table.max(axis=1) for table in tables], axis=0), np.finfo(np.float64).tiny)
    prices = np.array([(1.0, *pair) for pair in itertools.product(PRICES, repeat=len(USES))])
    best = [(prices @ (table / largest[:, None])).argmin(axis=1) for table in tables]
    return list(zip(*(own.tolist() for own in best), strict=True))
