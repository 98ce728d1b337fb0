"""Choices that truly keep a budget for seconds: each is timed whole in the engine.

Times of options add up to a prediction, and a solver seeks out where that is too low. So its choice is run whole, and
one that takes longer than the budget is made anew for as much less as it was off.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, Problem
from qcompress.budgets import LATENCY
from solvers import Solution
from solvers.base import relative_gap

ROUNDS = 4
"""Choices that are made and timed at most."""

TOLERANCE = 0.02
"""Relative differences of times that are nothing to tell."""

Seconds = Callable[[Sequence[NDArray[np.int64]]], list[float]]
"""Times whole choices."""


def solved_in_time(
    problem: Problem, solution: Solution, seconds: Seconds, solve_for: Callable[[Problem], Solution]
) -> tuple[Problem, Solution]:
    """A problem with a budget for seconds whose solution keeps the one of ``problem`` when it is timed whole.

    Args:
        problem: with the budget.
        solution: of it, with a choice.
        seconds: times choices.
        solve_for: makes a choice for a smaller budget.

    Returns:
        The problem and its solution; of all choices the one that takes least too long, where none is in time. The
        bound is that of the first solution.
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
    stated, solution, _ = min(tried, key=lambda own: max(own[2], (1 + TOLERANCE) * limit))
    if solution is not first:
        solution = replace(solution, bound=first.bound, gap=relative_gap(solution.objective, first.bound))
    return stated, solution


def cached(seconds: Seconds) -> Seconds:
    """The same clock, which times every choice once.

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
