"""Repair: a choice that breaks budgets is made feasible by the cheapest switches.

Three steps, each only when the one before did not end within the budgets: switches in the order of objective per
unit of excess (a lazily updated heap over the groups, so 10,000 groups take milliseconds); with several budgets a
breakout search, which weighs a budget more the longer it stays broken; a depth-first search that is complete for
small problems. What always holds: what comes back is within every budget, as `Problem.evaluate` judges it.
"""

from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta, fits, switch, to_arrays

BREAKOUT_STEPS, BREAKOUT_WORK = 200, 1_000_000
"""Limits of the breakout search: a number of steps, or the number of steps that weigh so many switches."""

TREE_NODES = 2_000_000
"""Nodes of the depth-first search before it gives up."""


def repair(problem: Problem, choice: ArrayLike) -> Integers | None:
    """A choice within every budget, close to ``choice`` ``(G,)``; None when none was found.

    With at most one budget one is found whenever one exists. A choice that is within the budgets comes back as it is.

    Raises:
        InvalidProblemError: ``choice`` is not one option index per group.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> repair(problem, [0, 0]).tolist()
    [0, 1]
    """
    chosen = problem.flat(choice).copy()
    if not repair_flat(to_arrays(problem), chosen):
        return None
    repaired = chosen - problem.group_offsets[:-1]
    return repaired if problem.evaluate(repaired).feasible else None


def repair_flat(a: Arrays, chosen: Integers) -> bool:
    """Repair flat options in place, for callers that hold `Arrays`; whether every budget holds now."""
    return bool(_cheapest(a, chosen) or _breakout(a, chosen) or _tree(a, chosen))


@compiled
def _excess(a: Arrays, usage: Floats) -> float:
    excess = 0.0
    for k in range(len(usage)):
        excess += max(0.0, usage[k] - a.limit[k]) / a.unit[k]
    return excess


@compiled
def _rounding(a: Arrays) -> float:
    """Changes of the excess up to here may be rounding alone; a search that took them for progress could cycle."""
    return 1e-12 * (1.0 + (np.abs(a.limit) / a.unit).sum())  # type: ignore[no-any-return]


@compiled
def _best_switch(
    a: Arrays, chosen: Integers, total: Floats, field: Floats, usage: Floats, group: int
) -> tuple[float, int]:
    """The option of ``group`` that lowers the excess at the least objective per unit, and that price."""
    old, best, price = chosen[group], -1, np.inf
    excess, rounding = _excess(a, usage), _rounding(a)
    for new in range(a.starts[group], a.starts[group + 1]):
        lower = excess
        for k in range(len(usage)):
            lower -= max(0.0, usage[k] + a.use[new, k] - a.use[old, k] - a.limit[k]) / a.unit[k]
        if lower > rounding:
            ratio = delta(a, total, field, old, new) / lower
            if ratio < price:
                best, price = new, ratio
    return price, best


@compiled
def _cheapest(a: Arrays, chosen: Integers) -> bool:
    total, field, usage = begin(a, chosen)
    if fits(a, usage):
        return True
    heap = [(0.0, 0)]
    heap.clear()
    for group in range(len(chosen)):
        price, _ = _best_switch(a, chosen, total, field, usage, group)
        if price < np.inf:
            heap.append((price, group))
    heapify(heap)
    while len(heap) and not fits(a, usage):
        _, group = heappop(heap)
        price, new = _best_switch(a, chosen, total, field, usage, group)
        if new < 0:
            continue
        if len(heap) and price > heap[0][0]:  # others' switches have made it dearer than it was
            heappush(heap, (price, group))
            continue
        switch(a, chosen, total, field, usage, new)
        price, new = _best_switch(a, chosen, total, field, usage, group)
        if new >= 0:
            heappush(heap, (price, group))
    _, _, usage = begin(a, chosen)  # without the rounding of many small steps
    return bool(fits(a, usage))


@compiled
def _breakout(a: Arrays, chosen: Integers) -> bool:
    """Steepest descent on the weighted excess; at a local minimum every broken budget weighs more."""
    num_budgets = len(a.limit)
    if num_budgets < 2:
        return False
    _, _, usage = begin(a, chosen)
    weight = np.ones(num_budgets)
    for _ in range(max(BREAKOUT_STEPS, BREAKOUT_WORK // (len(a.cost) * num_budgets))):
        if fits(a, usage):
            _, _, usage = begin(a, chosen)
            return bool(fits(a, usage))
        least, best = -_rounding(a), -1
        for new in range(len(a.cost)):
            old = chosen[a.group_of[new]]
            change = 0.0
            for k in range(num_budgets):
                after = max(0.0, usage[k] + a.use[new, k] - a.use[old, k] - a.limit[k])
                change += weight[k] * (after - max(0.0, usage[k] - a.limit[k])) / a.unit[k]
            if change < least:
                least, best = change, new
        if best < 0:
            for k in range(num_budgets):
                if usage[k] > a.limit[k]:
                    weight[k] += 1.0
            if weight.max() > 1000.0 * weight.min():
                return False
        else:
            old = chosen[a.group_of[best]]
            chosen[a.group_of[best]] = best
            usage += a.use[best] - a.use[old]
    return False


@compiled
def _tree(a: Arrays, chosen: Integers) -> bool:
    """The first choice within the budgets in depth-first order, cut where the cheapest rest is too much."""
    num_groups, num_budgets = len(chosen), len(a.limit)
    rest = np.zeros((num_groups + 1, num_budgets))  # the least the groups from here on can use
    for group in range(num_groups - 1, -1, -1):
        for k in range(num_budgets):
            rest[group, k] = rest[group + 1, k] + a.use[a.starts[group] : a.starts[group + 1], k].min()
    used = np.zeros((num_groups + 1, num_budgets))
    depth, path = 0, a.starts[:-1].copy()
    for _ in range(TREE_NODES):
        if path[depth] == a.starts[depth + 1]:
            if depth == 0:
                return False
            depth -= 1
            path[depth] += 1
            continue
        used[depth + 1] = used[depth] + a.use[path[depth]]
        if not fits(a, used[depth + 1] + rest[depth + 1]):
            path[depth] += 1
        elif depth + 1 == num_groups:
            chosen[:] = path
            return True
        else:
            depth += 1
            path[depth] = a.starts[depth]
    return False
