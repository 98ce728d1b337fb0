"""Uses in a few whole levels, so that the slack bits of a budget, and the biases between them, are few and small."""

from types import MappingProxyType

import numpy as np

from formulations.problem import Problem
from formulations.validation import frozen

LEVELS, FEWEST, MOST = 32, 64, 4096
"""Steps between the least use and the budget: this many per group, within limits."""

LARGEST = 2.0**32
"""Largest count of an option: what is left of a budget may be nothing but a rounding error, and is then no unit."""


def levels_for(problem: Problem) -> int:
    """Return how many levels suit a problem."""
    return min(max(LEVELS * problem.num_groups, FEWEST), MOST)


def in_levels(problem: Problem, levels: int) -> Problem:
    """Return the problem with every budgeted use counted in levels above its group's least one, rounded.

    Resources without a budget, and their pair terms, are left out.
    """
    problem.require_linear_budgets("in_levels")
    starts, group_of = problem.group_offsets[:-1], problem.group_of
    resources, budgets = {}, {}
    for name, budget in problem.budgets.items():
        use = problem.resources[name]
        least = np.minimum.reduceat(use, starts)
        extra, left = use - least[group_of], max(budget - problem.fixed.get(name, 0.0) - least.sum(), 0.0)
        whole = bool((extra == np.floor(extra)).all()) and extra.max() < 2**53
        unit = max(left / levels, extra.max() / LARGEST) or 1.0
        if whole:  # a multiple of what all are multiples of, so that nothing is lost where there are few steps
            finest = float(np.gcd.reduce(extra.astype(np.int64))) or 1.0
            unit = finest * np.ceil(unit / finest)
        resources[name] = frozen(np.round(extra / unit))
        budgets[name] = float(np.round(left / unit))
    return problem.derived(
        resources=MappingProxyType(resources),
        budgets=MappingProxyType(budgets),
        fixed=MappingProxyType({}),
        resource_pairs=MappingProxyType({}),
    )
