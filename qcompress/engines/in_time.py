"""Choices that keep a time budget when the whole model runs in the engine.

The predicted time of a choice is a sum over its options, and a solver exploits errors of that sum. The model with the
choice is therefore timed as a whole. If it exceeds the budget, the problem is solved again with a budget that is
smaller by the same ratio. If the sum exceeds the budget for every choice, the choice with the shortest sum is timed as
well, and so are uniform settings: a mixture pays for conversions, which a sum over options predicts worst.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, PairTerms, Problem
from formulations.problem import limit_of
from qcompress.budgets import LATENCY
from solvers import Solution, Status
from solvers.base import relative_gap
from solvers.search import cheapest

ROUNDS = 4
"""Maximum number of choices that are solved for and timed."""

TOLERANCE = 0.02
"""Relative excess over the budget that counts as measurement noise."""

Seconds = Callable[[Sequence[NDArray[np.int64]]], list[float]]
"""Function that returns the measured seconds of choices, each timed as a whole model."""


def with_reachable_time(
    problem: Problem,
    seconds: Seconds,
    solve_for: Callable[[Problem], Solution],
    others: Sequence[NDArray[np.int64]] = (),
) -> Problem:
    """Return the problem, with its time budget raised to the shortest predicted time of a choice that keeps it.

    Args:
        problem: problem with a budget for `LATENCY`.
        seconds: function that times choices.
        solve_for: function that solves a problem.
        others: further choices to time, besides the one with the shortest predicted time; they keep the other budgets.

    Raises:
        InfeasibleBudgetError: none of these choices keeps the budget when timed either.
    """
    limit, use = problem.budgets[LATENCY], problem.resources[LATENCY]
    if problem.usage(problem.flat(cheapest(problem, use)))[LATENCY] <= limit_of(limit):
        return problem
    fastest = solve_for(_by_time(problem)).choice
    if fastest is None:
        return problem  # for other budgets
    predicted = problem.usage(problem.flat(fastest))[LATENCY]
    if predicted <= limit_of(limit):
        return problem
    choices = [fastest, *others]
    taken = seconds(choices)
    in_time = [
        problem.usage(problem.flat(choice))[LATENCY]
        for choice, choice_s in zip(choices, taken, strict=True)
        if choice_s <= (1 + TOLERANCE) * limit
    ]
    if not in_time:
        error = InfeasibleBudgetError(
            f"no choice meets the budget for {LATENCY}: asked for at most {1000 * limit:.4g} ms; the fastest takes "
            f"{1000 * predicted:.4g} ms by prediction, and {1000 * min(taken):.4g} ms timed as a whole"
        )
        error.problem = problem
        raise error
    return problem.with_budgets(**{LATENCY: min(in_time)})


def _by_time(problem: Problem) -> Problem:
    """Return the problem with the predicted time as its objective."""
    terms = problem.resource_pairs.get(LATENCY)
    return without_time_budget(problem).derived(
        cost=problem.resources[LATENCY],
        pairs=PairTerms(sparse=terms),
        offset=problem.fixed.get(LATENCY, 0.0),
    )


def solved_in_time(
    problem: Problem, start: Problem, solution: Solution, seconds: Seconds, solve_for: Callable[[Problem], Solution]
) -> tuple[Problem, Solution]:
    """Solve again with smaller budgets until the choice, timed as a whole model, keeps the time budget of ``problem``.

    Args:
        problem: problem with a budget for `LATENCY`.
        start: the same, or with the larger budget of `with_reachable_time`.
        solution: solution of ``start``, with a choice.
        seconds: function that times choices.
        solve_for: function that solves the problem with a smaller budget.

    Returns:
        The problem with the budget that was solved for, and its solution; if no choice keeps the budget, the one with
        the smallest excess. The bound is that of the first solution, or none if ``start`` has a larger budget.
    """
    first, limit, stated = solution, problem.budgets[LATENCY], start
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
    bound = first.bound if start is problem else None
    if solution is not first or bound is None:
        solution = replace(solution, bound=bound, gap=relative_gap(solution.objective, bound))
    if start is not problem:
        solution = replace(solution, status=Status.FEASIBLE)  # by its measured time, which nothing is proven about
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
