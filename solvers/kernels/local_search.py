"""Polish: descent from a feasible choice by switches of one group or of two groups at once, within the budgets.

A nearly used-up budget blocks almost every single switch that would improve the objective. Two switches together, of
which one frees what the other uses, can still improve it. The result is always feasible and never worse.
"""

import time
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, cross, delta, switch, to_arrays

PASSES = 20
"""Maximum number of passes over all groups."""

PAIRS = 4_000_000
"""Maximum number of pairs of switches evaluated in a pass. If there are more (above 2,000 options), evenly spread
partners are tried. This also limits how many options are evaluated again after a pair of switches."""


class Weights(NamedTuple):
    """For each option ``(V,)``, the change from switching to it alone, and bounds on cross terms with other switches.

    The factor's part of a cross term is at most the product of both ``length`` (Cauchy-Schwarz), the sparse part at
    most either ``reach``.
    """

    single: Floats
    length: Floats
    reach: Floats


def polish(problem: Problem, choice: ArrayLike, seconds: float = float("inf")) -> Integers:
    """Improve a feasible choice ``(G,)`` until no single switch and no pair of switches improves it.

    `PASSES`, `PAIRS` and ``seconds`` (checked between passes) limit the work on large problems, for which an improving
    pair may be left.

    Raises:
        ValueError: ``choice`` exceeds a budget; `repair` it first.
        InvalidProblemError: ``choice`` is not one option index per group.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> polish(problem, [1, 0]).tolist()
    [0, 1]
    """
    chosen = problem.flat(choice).copy()
    if broken := problem.evaluate(choice).violations:
        raise ValueError(f"polish needs a feasible choice, this one is over budget by {broken}; repair it first")
    a, deadline = to_arrays(problem), time.perf_counter() + seconds
    for number in range(PASSES):
        if not _polish_pass(a, chosen, number) or time.perf_counter() > deadline:
            break
    polished = chosen - problem.group_offsets[:-1]
    better = problem.evaluate(polished)
    return polished if better.feasible else np.array(choice, dtype=np.int64)


@compiled
def polish_flat(a: Arrays, chosen: Integers, passes: int) -> bool:
    """Polish feasible flat options in place, given `Arrays`; return whether the last pass still improved them."""
    number, improved = 0, True
    while improved and number < passes:
        improved = _polish_pass(a, chosen, number)
        number += 1
    return improved


@compiled
def _polish_pass(a: Arrays, chosen: Integers, number: int) -> bool:
    """Run one pass over all groups, first by single switches, then by pairs; return whether it improved."""
    num_groups = len(chosen)
    step = max(1, len(a.cost) * len(a.cost) // PAIRS)
    left = 1 + PAIRS // len(a.cost)  # pairs that may still be switched
    total, field, usage = begin(a, chosen)  # afresh in every pass, to prevent accumulated rounding errors
    improved = False
    for group in range(num_groups):
        improved |= _improve_alone(a, chosen, total, field, usage, group)
    weights = Weights(np.empty(len(a.cost)), np.empty(len(a.cost)), np.empty(len(a.cost)))
    _weigh(a, chosen, total, field, weights)
    first = number * (num_groups // PASSES)  # if a pass ends early, the next one starts at other groups
    for offset in range(num_groups):
        group = (first + offset) % num_groups
        while left > 0 and _improve_paired(a, chosen, total, field, usage, weights, group, number % step, step):
            improved, left = True, left - 1
            _weigh(a, chosen, total, field, weights)
    return improved


@compiled
def descend_flat(a: Arrays, chosen: Integers) -> None:
    """Improve feasible flat options in place by single switches until none helps; ``O(V)`` evaluations per pass."""
    total, field, usage = begin(a, chosen)
    improved = True
    while improved:
        improved = False
        for group in range(len(chosen)):
            improved |= _improve_alone(a, chosen, total, field, usage, group)


@compiled
def _fits_both(a: Arrays, usage: Floats, old1: int, new1: int, old2: int, new2: int) -> bool:
    for k in range(len(usage)):
        if usage[k] + a.use[new1, k] - a.use[old1, k] + a.use[new2, k] - a.use[old2, k] > a.limit[k]:
            return False
    return True


@compiled
def _improve_alone(a: Arrays, chosen: Integers, total: Floats, field: Floats, usage: Floats, group: int) -> bool:
    old, best = chosen[group], -1
    least = -1e-13 * (1.0 + abs(a.cost[old]))  # smaller changes are rounding errors
    for new in range(a.starts[group], a.starts[group + 1]):
        if new != old and _fits_both(a, usage, old, new, new, new):
            change = delta(a, total, field, old, new)
            if change < least:
                least, best = change, new
    if best >= 0:
        switch(a, chosen, total, field, usage, best)
    return best >= 0


@compiled
def _weigh(a: Arrays, chosen: Integers, total: Floats, field: Floats, weights: Weights) -> None:
    """Compute ``weights`` for the present choice."""
    single, length, reach = weights
    for v in range(len(single)):
        old = chosen[a.group_of[v]]
        single[v] = delta(a, total, field, old, v)
        square, new_most, old_most = 0.0, 0.0, 0.0
        for k in range(a.factor.shape[1]):
            square += (a.factor[v, k] - a.factor[old, k]) ** 2
        for entry in range(a.indptr[v], a.indptr[v + 1]):
            new_most = max(new_most, abs(a.data[entry]))
        for entry in range(a.indptr[old], a.indptr[old + 1]):
            old_most = max(old_most, abs(a.data[entry]))
        length[v], reach[v] = np.sqrt(square), 2.0 * (new_most + old_most)


@compiled
def _improve_paired(
    a: Arrays,
    chosen: Integers,
    total: Floats,
    field: Floats,
    usage: Floats,
    weights: Weights,
    group: int,
    first: int,
    step: int,
) -> bool:
    """Make the best pair of switches of ``group`` and a partner, if any improves the objective."""
    single, length, reach = weights
    old1, best1, best2 = chosen[group], -1, -1
    least = -1e-13 * (1.0 + abs(a.cost[old1]))
    for partner in range(first, len(chosen), step):
        if partner == group:
            continue
        old2 = chosen[partner]
        for new1 in range(a.starts[group], a.starts[group + 1]):
            if new1 == old1:
                continue
            for new2 in range(a.starts[partner], a.starts[partner + 1]):
                alone = single[new1] + single[new2]
                if alone - length[new1] * length[new2] - min(reach[new1], reach[new2]) >= least:
                    continue
                if new2 == old2 or not _fits_both(a, usage, old1, new1, old2, new2):
                    continue
                change = alone + cross(a, old1, new1, old2, new2)
                if change < least:
                    least, best1, best2 = change, new1, new2
    if best1 >= 0:
        switch(a, chosen, total, field, usage, best1)
        switch(a, chosen, total, field, usage, best2)
    return best1 >= 0
