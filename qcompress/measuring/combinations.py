"""Decisions on channels and codes: which combinations of a width and codes a coupled set has.

All combinations that fit are options, up to `MAX_OPTIONS`. Beyond it, ranks are thinned out first: of each layer those
stay that are the best choice at the most prices of bytes and multiply-accumulates. If there are too many even without
ranks, the layers of the decision share their codes: all take the first, all the second, and so on.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qcompress.measuring.codes_beside import numbers_kept, with_home_kept
from qcompress.measuring.removals import Removals
from qcompress.structure.coded import USES, CodedLayer
from qcompress.transforms.base import Transform
from qcompress.transforms.low_rank.factors import LowRank

MAX_OPTIONS = 1024
"""Largest number of combinations of one decision for which its layers choose their codes independently."""

PRICES = np.concatenate([[0.0], np.logspace(-6, 2, 17)])
"""Prices of the largest use, in units of the largest cost, at which options are compared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
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
        fitting = [_fitting(coded[layer], codes[layer], kept, kept[place]) for layer in layers]
        chosen = _chosen(
            len(kept[place]), [codes[layer] for layer in layers],
            [_by_use(coded[layer], codes[layer], costs[layer]) for layer in layers],
        )  # fmt: skip
        rows = [
            (width, *numbers)
            for width in range(len(kept[place]))
            for numbers in chosen
            if all(fits[width, number] for fits, number in zip(fitting, numbers, strict=True))
        ]
        decisions.append(Decision(set_index=place, layers=layers, rows=np.array(rows, dtype=np.int64)))
    for index, layer in enumerate(coded):
        if layer.home is None:
            alone = np.arange(len(codes[index]), dtype=np.int64)[:, None]
            decisions.append(Decision(set_index=None, layers=(index,), rows=alone))
    return decisions


def _fitting(
    layer: CodedLayer, codes: Sequence[Transform], kept: Mapping[int, Sequence[int]], widths: Sequence[int]
) -> NDArray[np.bool_]:
    """Return ``(widths, options)`` whether an option fits the layer at a width of the set that it belongs to.

    Where nothing is left of the layer, only the first one does.
    """
    fits = np.zeros((len(widths), len(codes)), dtype=bool)
    for place, width in enumerate(widths):
        own = with_home_kept(layer, kept, width)
        left = bool(layer.shapes(own))
        fits[place] = [not layer.why_not(code, own) if left else code is codes[0] for code in codes]
    return fits


def _chosen(
    num_widths: int, codes: Sequence[Sequence[Transform]], best_first: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Return combinations of the options of a decision's layers, which are offered at every width.

    Args:
        num_widths: number of widths.
        codes: options of each layer.
        best_first: the options of each layer that are ranks, the most useful first.
    """
    others = [
        [number for number in range(len(own)) if number not in ranks]
        for own, ranks in zip(codes, best_first, strict=True)
    ]
    for most in range(max(map(len, best_first), default=0), -1, -1):
        taken = [sorted([*rest, *ranks[:most]]) for rest, ranks in zip(others, best_first, strict=True)]
        if num_widths * math.prod(map(len, taken)) <= MAX_OPTIONS:
            return list(itertools.product(*taken))
    turns = max(map(len, others))
    shared = [tuple(rest[min(turn, len(rest) - 1)] for rest in others) for turn in range(turns)]
    return list(dict.fromkeys([*shared, *_shared_ranks(codes, [sorted(ranks) for ranks in best_first])]))


def _shared_ranks(codes: Sequence[Sequence[Transform]], ranks: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Yield combinations in which every layer has a rank; layers without any are stored as the others' factors are."""
    for turn in range(max(map(len, ranks), default=0)):
        chosen = [own[min(turn, len(own) - 1)] if own else None for own in ranks]
        then = next(
            transform.then
            for options, number in zip(codes, chosen, strict=True)
            if number is not None and isinstance(transform := options[number], LowRank)
        )
        alike = [options.index(then) if then in options else 0 for options in codes]
        yield tuple(same if number is None else number for same, number in zip(alike, chosen, strict=True))


def _by_use(layer: CodedLayer, codes: Sequence[Transform], cost: NDArray[np.float64]) -> list[int]:
    """Return the ranks among a layer's options, those first that are the best of all options at the most prices.

    Of ranks that are never the best, the closest comes first.
    """
    target = layer.part.target
    uses = np.array([[use(code, target) for code in codes] for use in USES.values()], dtype=np.float64)
    scaled = [cost, *uses] / np.maximum(np.max([cost, *uses], axis=1, keepdims=True), np.finfo(np.float64).tiny)
    prices = np.array([(1.0, *pair) for pair in itertools.product(PRICES, repeat=2)])
    values = prices @ scaled
    least = values.min(axis=1, keepdims=True)
    wins, regret = (values <= least).sum(axis=0), (values - least).min(axis=0)
    ranks = [number for number, code in enumerate(codes) if code.replaces_layer(target)]
    return sorted(ranks, key=lambda number: (-wins[number], regret[number]))
