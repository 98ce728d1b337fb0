"""Update a `Solution` with a better choice or bound from another source."""

from collections.abc import Iterable
from dataclasses import replace

from numpy.typing import ArrayLike

from formulations import Problem
from solvers.base import Search
from solvers.solution import Solution, Status

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
    search = Search(problem, solver=solution.solver, seed=solution.seed)
    for choice in (solution.choice, *choices):
        if choice is not None:
            search.offer(choice)
    for bound in (solution.bound, *bounds):
        if bound is not None:
            search.raise_bound(bound)
    if solution.status is Status.INFEASIBLE and search.choice is None:
        search.close()
    judged = search.solution(solution.stop_reason, solution.options)
    return replace(solution, **{name: getattr(judged, name) for name in JUDGED})
