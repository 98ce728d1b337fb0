"""Which codes of a decision's layers are combined, so that the combinations are not too many.

Up to `MAX_OPTIONS`, all are. Beyond it, ranks are thinned out first: of each layer those stay that are the best choice
at the most prices of bytes and multiply-accumulates. If there are too many even without ranks, the layers of the
decision share their codes: all take the first, all the second, and so on.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qcompress.structure.coded import USES, CodedLayer
from qcompress.transforms.base import Transform
from qcompress.transforms.low_rank.factors import LowRank

MAX_OPTIONS = 1024
"""Largest number of combinations of one decision for which its layers choose their codes independently."""

PRICES = np.concatenate([[0.0], np.logspace(-6, 2, 17)])
"""Prices of the largest use, in units of the largest cost, at which options are compared."""


def chosen_codes(
    num_widths: int, codes: Sequence[Sequence[Transform]], best_first: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Return combinations of the options of a decision's layers, which are offered at every width.

    Args:
        num_widths: number of widths.
        codes: options of each layer.
        best_first: the options of each layer that are ranks, the most useful first.
    """
    if not codes:
        return [()]
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


def most_useful(layer: CodedLayer, codes: Sequence[Transform], cost: NDArray[np.float64]) -> list[int]:
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
