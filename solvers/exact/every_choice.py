"""Enumerate every choice of a problem whose budgets have pair terms, as the reference for other solvers."""

import numpy as np

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, objective, terms
from solvers.kernels.paired_uses import PairedUses, arrays_of, begin_uses
from solvers.search import Search

TIE, ROUNDING = 1e-12, 1e-15
"""Objectives are ties, and the first choice wins, if they differ by less than the first number relative to the size of
their terms, or by less than the second relative to the largest terms of all."""


def rounding_of_ties(problem: Problem) -> float:
    """Return how much equal objectives may differ, whatever their terms."""
    largest = np.maximum.reduceat(np.abs(problem.cost), problem.group_offsets[:-1])
    return ROUNDING * float(largest.sum() + 1.0)  # pair terms are scaled to about 1


def enumerate_paired(problem: Problem, search: Search) -> None:
    """Offer the best choice and close the search, unless the time is over before all choices are tried."""
    if offer_paired(problem, search):
        search.close()


def offer_paired(problem: Problem, search: Search) -> bool:
    """Try every choice, one option of the first group at a time, and offer the best ones; returns whether all were."""
    a, u = arrays_of(problem)
    chosen, best = problem.group_offsets[:-1].copy(), np.array([np.inf, 0.0])
    least, rounding = chosen.copy(), rounding_of_ties(problem)
    for first in range(a.starts[0], a.starts[1]):
        if search.expired():
            return False
        chosen[:] = a.starts[:-1]
        chosen[0] = first
        _enumerate(a, u, chosen, best, least, rounding)
        if np.isfinite(best[0]):
            search.offer(least - a.starts[:-1])
    return True


@compiled
def _enumerate(a: Arrays, u: PairedUses, chosen: Integers, best: Floats, least: Integers, rounding: float) -> None:
    """Try all choices with the given option of the first group, varying the last group fastest."""
    last = len(chosen) - 1
    while True:
        _, usage = begin_uses(u, chosen)
        within = True
        for k in range(len(usage)):
            within &= usage[k] <= u.limit[k]
        if within:
            _, field, _ = begin(a, chosen)
            value = objective(a, chosen, field)
            if value < best[0] - best[1]:
                best[0] = value
                best[1] = max(rounding, TIE * terms(a, chosen, value))
                least[:] = chosen
        group = last
        while group > 0 and chosen[group] + 1 == a.starts[group + 1]:
            chosen[group] = a.starts[group]
            group -= 1
        if group == 0:
            return
        chosen[group] += 1
