"""Repair: make a choice that exceeds budgets feasible by the cheapest switches.

There are three steps, each used only if the previous one fails. First, switches in the order of cost per unit of excess
(a lazily updated heap over the groups, so 10,000 groups take milliseconds). Second, with several budgets, a breakout
search, which gives a budget more weight the longer it is exceeded. Third, a depth-first search, which is complete for
small problems. The result is within every budget, as `Problem.evaluate` computes it.
"""

import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta, fits, switch, to_arrays

BREAKOUT_STEPS, BREAKOUT_WORK = 200, 1_000_000
"""Number of steps of the breakout search, or number of evaluated switches if that allows more steps."""

TREE_NODES = 2_000_000
"""Maximum number of nodes of the depth-first search."""


FOUND, FAILED, GOES_ON = 1, 0, -1
"""How a slice of a step ends."""

GRACE_S, SLICE_WORK = 0.1, 10_000_000
"""Time in seconds that the last two steps may take even if the time is over, and their work between two checks."""


def repair(problem: Problem, choice: ArrayLike, expired: Callable[[], bool] | None = None) -> Integers | None:
    """Find a choice within every budget, close to ``choice`` ``(G,)``; None when none was found.

    With at most one budget, a choice is found whenever one exists. A choice within the budgets is returned unchanged.

    Args:
        problem: the problem.
        choice: the choice to start from.
        expired: function that says whether the time is over.

    Raises:
        InvalidProblemError: ``choice`` is not one option index per group.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> repair(problem, [0, 0]).tolist()
    [0, 1]
    """
    chosen = problem.flat(choice).copy()
    if not repair_flat(to_arrays(problem), chosen, expired):
        return None
    repaired = chosen - problem.group_offsets[:-1]
    return repaired if problem.evaluate(repaired).feasible else None


def repair_flat(a: Arrays, chosen: Integers, expired: Callable[[], bool] | None = None) -> bool:
    """Repair flat options in place, given `Arrays`; return whether every budget holds."""
    if _cheapest(a, chosen):
        return True
    start = time.perf_counter()

    def over() -> bool:
        return expired is not None and time.perf_counter() - start > GRACE_S and expired()

    return _broken_out(a, chosen, over) or _searched(a, chosen, over)


def warm_repair(a: Arrays, chosen: Integers) -> None:
    """Run every step once, so that all of them are compiled."""
    _cheapest(a, chosen.copy())
    _broken_out(a, chosen.copy(), lambda: False)
    _searched(a, chosen.copy(), lambda: False)


def _broken_out(a: Arrays, chosen: Integers, over: Callable[[], bool]) -> bool:
    """Run the breakout search, in slices between which the clock is checked."""
    if len(a.limit) < 2:
        return False
    work = len(a.cost) * len(a.limit)
    left, weight = max(BREAKOUT_STEPS, BREAKOUT_WORK // work), np.ones(len(a.limit))
    while left > 0:
        steps = min(left, max(1, SLICE_WORK // work))
        if (end := _breakout(a, chosen, weight, steps)) != GOES_ON:
            return bool(end == FOUND)
        left -= steps
        if over():
            break
    return False


def _searched(a: Arrays, chosen: Integers, over: Callable[[], bool]) -> bool:
    """Run the depth-first search, in slices between which the clock is checked."""
    least = np.minimum.reduceat(a.use, a.starts[:-1], axis=0)
    rest = np.zeros((len(chosen) + 1, len(a.limit)))  # the smallest uses by the groups from here on
    rest[:-1] = np.cumsum(least[::-1], axis=0)[::-1]
    used, path, depth, left = np.zeros_like(rest), a.starts[:-1].copy(), 0, TREE_NODES
    while left > 0:
        nodes = min(left, max(1, SLICE_WORK // (8 * len(a.limit) + 8)))
        end, depth = _tree(a, rest, used, path, depth, nodes)
        if end == FOUND:
            chosen[:] = path
        if end != GOES_ON:
            return bool(end == FOUND)
        left -= nodes
        if over():
            break
    return False


@compiled
def _excess(a: Arrays, usage: Floats) -> float:
    excess = 0.0
    for k in range(len(usage)):
        excess += max(0.0, usage[k] - a.limit[k]) / a.unit[k]
    return excess


@compiled
def _rounding(a: Arrays) -> float:
    """Return the largest change of the excess that may be rounding; counting it as progress could cause cycles."""
    return 1e-12 * (1.0 + (np.abs(a.limit) / a.unit).sum())  # type: ignore[no-any-return]


@compiled
def _best_switch(
    a: Arrays, chosen: Integers, total: Floats, field: Floats, usage: Floats, group: int
) -> tuple[float, int]:
    """Return the smallest cost per unit at which ``group`` can lower the excess, and the option that does so."""
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
        if len(heap) and price > heap[0][0]:  # other switches have increased its cost
            heappush(heap, (price, group))
            continue
        switch(a, chosen, total, field, usage, new)
        price, new = _best_switch(a, chosen, total, field, usage, group)
        if new >= 0:
            heappush(heap, (price, group))
    _, _, usage = begin(a, chosen)  # afresh, without the rounding errors of many small steps
    return bool(fits(a, usage))


@compiled
def _breakout(a: Arrays, chosen: Integers, weight: Floats, steps: int) -> int:
    """Descend steepest on the weighted excess; at a local minimum every exceeded budget gets more weight."""
    num_budgets = len(a.limit)
    _, _, usage = begin(a, chosen)
    for _ in range(steps):
        if fits(a, usage):
            _, _, usage = begin(a, chosen)
            return FOUND if fits(a, usage) else FAILED
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
                return FAILED
        else:
            old = chosen[a.group_of[best]]
            chosen[a.group_of[best]] = best
            usage += a.use[best] - a.use[old]
    return GOES_ON


@compiled
def _tree(a: Arrays, rest: Floats, used: Floats, path: Integers, depth: int, nodes: int) -> tuple[int, int]:
    """Find the first feasible choice in depth-first order, pruned by the smallest uses ``rest`` of remaining groups.

    Returns how it ended, and the depth to continue from; ``used`` and ``path`` are changed in place.
    """
    num_groups = len(path)
    for _ in range(nodes):
        if path[depth] == a.starts[depth + 1]:
            if depth == 0:
                return FAILED, depth
            depth -= 1
            path[depth] += 1
            continue
        used[depth + 1] = used[depth] + a.use[path[depth]]
        if not fits(a, used[depth + 1] + rest[depth + 1]):
            path[depth] += 1
        elif depth + 1 == num_groups:
            return FOUND, depth
        else:
            depth += 1
            path[depth] = a.starts[depth]
    return GOES_ON, depth
