"""Compute objective and uses of a choice by exact sums, independently of `Problem.evaluate`."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem

TOLERANCE = 1e-9
"""Maximum relative difference of two sums of the same numbers in different orders (about 1e-13 for a million)."""


def recomputed(problem: Problem, choice: ArrayLike) -> tuple[float, dict[str, float]]:
    """Compute the objective of a choice ``(G,)`` and its excess over violated budgets, exactly (`math.fsum`).

    The code loops over the chosen options and shares nothing with `Problem.evaluate`.

    Raises:
        ValueError: the choice is not one option number for every group.

    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> recomputed(problem, [0, 1]), recomputed(problem, [0, 0])
    ((1.0, {}), (0.0, {'bytes': 4.0}))
    """
    chosen = _flat(problem, np.asarray(choice))
    terms = [float(problem.offset), *(float(problem.cost[v]) for v in chosen), *_met(problem.pairs.sparse, chosen)]
    if problem.pairs.factor is not None:
        for column in np.asarray(problem.pairs.factor)[chosen].T.tolist():
            total = math.fsum(column)
            terms += [0.5 * total * total, *(-0.5 * value * value for value in column)]
    excess = {}
    for name, budget in problem.budgets.items():
        alone = (float(problem.resources[name][v]) for v in chosen)
        together = _met(problem.resource_pairs.get(name), chosen)
        use = math.fsum([problem.fixed.get(name, 0.0), *alone, *together])
        if use > budget * (1 + TOLERANCE):
            excess[name] = use - budget
    return math.fsum(terms), excess


def _flat(problem: Problem, choice: NDArray[Any]) -> list[int]:
    """Return the flat numbers of the chosen options."""
    if choice.shape != (len(problem.groups),):
        raise ValueError(f"its choice has the shape {choice.shape}, for {len(problem.groups)} groups")
    first, chosen = 0, []
    for group, options, option in zip(problem.groups, problem.options, choice.tolist(), strict=True):
        if not isinstance(option, int) or not 0 <= option < len(options):
            raise ValueError(f"its choice takes option {option!r} of the {len(options)} of group {group!r}")
        chosen.append(first + option)
        first += len(options)
    return chosen


def _met(matrix: Any, chosen: list[int]) -> list[float]:
    """Return the entries of a sparse matrix between chosen options."""
    if matrix is None:
        return []
    among, entries = set(chosen), matrix.tocoo()
    listed = zip(entries.row.tolist(), entries.col.tolist(), entries.data.tolist(), strict=True)
    return [value for u, v, value in listed if u in among and v in among]
