"""Choices that keep a time budget when the whole model runs in the engine.

The predicted time of a choice is a sum over its options, and a solver exploits errors of that sum. The model of its
choice is therefore timed as a whole. If it exceeds the budget, the problem is solved again with a budget that is
smaller by the same ratio.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, Problem
from qcompress.budgets import LATENCY
from solvers import Solution
from solvers.base import relative_gap

ROUNDS = 4
"""Maximum number of choices that are solved for and timed."""

TOLERANCE = 0.02
"""Relative excess over the budget that counts as measurement noise."""

Seconds = Callable[[Sequence[NDArray[np.int64]]], list[float]]
"""Function that returns the measured seconds of choices, each timed as a whole model."""


def solved_in_time(
    problem: Problem, solution: Solution, seconds: Seconds, solve_for: Callable[[Problem], Solution]
) -> tuple[Problem, Solution]:
    """Solve again with smaller budgets until the choice, timed as a whole model, keeps the time budget of ``problem``.

    Args:
        problem: problem with a budget for `LATENCY`.
        solution: solution of it, with a choice.
        seconds: function that times choices.
        solve_for: function that solves the problem with a smaller budget.

    Returns:
        The problem with the budget that was solved for, and its solution; if no choice keeps the budget, the one with
        the smallest excess. The bound is that of the first solution.
    """
    first, limit, stated = solution, problem.budgets[LATENCY], problem
    tried = []
    for _ in range(ROUNDS):
        if solution.choice is None:
            break
        (taken,) = seconds([solution.choice])
        tried.append((stated, solution, taken))
        if taken <= (1 + TOLERANCE) * limit:
            break
        stated = problem.with_budgets(**{LATENCY: solution.usage[LATENCY] * limit / taken})
        try:
            solution = solve_for(stated)
        except InfeasibleBudgetError:
            break
    stated, solution, _ = min(tried, key=lambda attempt: max(attempt[2], (1 + TOLERANCE) * limit))
    if solution is not first:
        solution = replace(solution, bound=first.bound, gap=relative_gap(solution.objective, first.bound))
    return stated, solution


def without_time_budget(problem: Problem) -> Problem:
    """Return the problem without its budget for `LATENCY`, for choices whose time is measured.

    >>> use = {"latency_s": [2.0, 1.0], "bytes": [4, 2]}
    >>> problem = Problem(["a"], [["keep", "4 bit"]], [0, 1], use, {"latency_s": 1.0, "bytes": 4})
    >>> dict(without_time_budget(problem).budgets)
    {'bytes': 4.0}
    """
    budgets = {name: limit for name, limit in problem.budgets.items() if name != LATENCY}
    return problem.derived(budgets=MappingProxyType(budgets))


def cached(seconds: Seconds) -> Seconds:
    """Return the same function with a cache, so that every choice is timed once.

    >>> times = cached(lambda choices: [float(len(choices))] * len(choices))
    >>> times([np.array([0, 1]), np.array([1, 1])]), times([np.array([0, 1])])
    ([2.0, 2.0], [2.0])
    """
    known: dict[tuple[int, ...], float] = {}

    def looked_up(choices: Sequence[NDArray[np.int64]]) -> list[float]:
        names = [tuple(choice.tolist()) for choice in choices]
        new = {name: choice for name, choice in zip(names, choices, strict=True) if name not in known}
        if new:
            known.update(zip(new, seconds(list(new.values())), strict=True))
        return [known[name] for name in names]

    return looked_up
