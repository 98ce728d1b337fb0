"""Update a `Solution` with a better choice or bound from another source."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.solution import Solution, Status, relative_gap
from solvers.stated_search import StatedSearch

JUDGED = ("choice", "objective", "usage", "feasible", "bound", "gap", "status", "problem_fingerprint")
"""Fields that describe the answer; all other fields describe the run and are not changed."""


def with_known(
    problem: Problem, solution: Solution, *, choices: Iterable[ArrayLike] = (), bounds: Iterable[float | None] = ()
) -> Solution:
    """Return ``solution`` with the best of its choice and the given ones, and the best bound, evaluated as in any run.

    Args:
        problem: the problem of the solution, or the same problem with tighter budgets (bounds hold for these too).
        solution: result of one run.
        choices: choices, each ``(G,)``; those that exceed a budget are ignored.
        bounds: proven lower bounds on every feasible choice's objective.

    >>> from solvers import judge
    >>> problem = Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {})
    >>> better = with_known(problem, judge(problem, [1]), choices=[[0]], bounds=[0.0])
    >>> better.choice.tolist(), better.objective, str(better.status)
    ([0], 0.0, 'OPTIMAL')
    """
    search = StatedSearch(problem, solver=solution.solver, seed=solution.seed)
    if solution.choice is not None and search.offer(solution.choice) and solution.status is Status.OPTIMAL:
        assert search.objective is not None  # noqa: S101
        search.raise_bound(search.objective - 0.999 * search.tolerance())  # next to the offset, its bound is rounded
    for choice in choices:
        search.offer(choice)
    known = [bound for bound in (solution.bound, *bounds) if bound is not None and np.isfinite(bound)]
    for bound in known:
        search.raise_shown_bound(bound)
    if solution.status is Status.INFEASIBLE and search.choice is None:
        search.close()
    judged = search.solution(solution.stop_reason, solution.options)
    update = {name: getattr(judged, name) for name in JUDGED}
    if known:  # as given, without the allowance for rounding
        most = max(known) if judged.objective is None else min(max(known), judged.objective)
        update["bound"] = most if judged.bound is None else max(judged.bound, most)
        update["gap"] = relative_gap(judged.objective, update["bound"])
    return replace(solution, **update)
