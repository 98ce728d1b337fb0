"""Enumerate every choice of a problem whose budgets have pair terms, as the reference for other solvers."""

import numpy as np

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, objective
from solvers.kernels.paired_uses import PairedUses, arrays_of, begin_uses
from solvers.search import Search


def enumerate_paired(problem: Problem, search: Search) -> None:
    """Try every choice, one option of the first group at a time."""
    a, u = arrays_of(problem)
    chosen, best = problem.group_offsets[:-1].copy(), np.array([np.inf])
    least = chosen.copy()
    for first in range(a.starts[0], a.starts[1]):
        if search.expired():
            return
        chosen[:] = a.starts[:-1]
        chosen[0] = first
        _enumerate(a, u, chosen, best, least)
        if np.isfinite(best[0]):
            search.offer(least - a.starts[:-1])
    search.close()


@compiled
def _enumerate(a: Arrays, u: PairedUses, chosen: Integers, best: Floats, least: Integers) -> None:
    """Try all choices with the given option of the first group, varying the last group fastest."""
    last = len(chosen) - 1
    while True:
        _, usage = begin_uses(u, chosen)
        within = True
        for k in range(len(usage)):
            within &= usage[k] <= u.limit[k]
        if within:
            total, field, _ = begin(a, chosen)
            value = objective(a, chosen, total, field)
            if value < best[0] - 1e-12 * (1.0 + abs(value)):
                best[0] = value
                least[:] = chosen
        group = last
        while group > 0 and chosen[group] + 1 == a.starts[group + 1]:
            chosen[group] = a.starts[group]
            group -= 1
        if group == 0:
            return
        chosen[group] += 1
