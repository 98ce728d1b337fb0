"""Conditions on answers, compared with an enumeration of all choices by `Problem.evaluate`."""

import functools
import itertools
import json
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from solvers.base import Solver
from solvers.errors import SolverError
from solvers.solution import Solution, Status


class ConformanceError(SolverError, AssertionError):
    """A solver violates the requirements on every solver."""


@functools.lru_cache(maxsize=256)  # problems hash by identity; the suite uses the same ones repeatedly
def optimum(problem: Problem) -> float | None:
    """Return the minimum objective of a small problem by trying every choice, or None when none is feasible.

    >>> optimum(Problem(["a"], [["x", "y"]], [2.0, 1.0], {"bytes": [1, 2]}, {"bytes": 1}))
    2.0
    """
    judged = (problem.evaluate(choice) for choice in all_choices(problem))
    return min((evaluation.objective for evaluation in judged if evaluation.feasible), default=None)


def judge_answer(solver: Solver, problem: Problem, solution: Solution) -> None:
    """Check all conditions on an answer to a small problem."""
    judge_claims(solver, problem, solution)
    easy = len(problem.budgets) <= 1 and not problem.paired_budgets
    if easy or solver.exact:  # a heuristic may fail with several budgets or pair terms in one, but not with a plain one
        found = solution.choice is not None or optimum(problem) is None
        require(solver, found, f"no choice, though one exists ({solution.status})", problem)


def judge_claims(solver: Solver, problem: Problem, solution: Solution) -> None:
    """Check what an answer to a small problem claims; a run that was cut short may lack a choice and a bound."""
    judge_course(solver, problem, solution)
    best = optimum(problem)
    if best is None:
        require(solver, solution.choice is None, "a choice for an infeasible problem", problem)
        return
    require(solver, solution.status is not Status.INFEASIBLE, "called a feasible problem INFEASIBLE", problem)
    for bound in (solution.bound, *(point.bound for point in solution.trace)):
        sound = bound is None or bound <= best or close(problem, bound, best)
        require(solver, sound, f"bound {bound!r} lies above the optimum {best!r}", problem)
    if solution.status is Status.OPTIMAL:
        claim = f"called {solution.objective!r} OPTIMAL, the optimum is {best!r}"
        require(solver, close(problem, solution.objective, best), claim, problem)


def judge_course(solver: Solver, problem: Problem, solution: Solution) -> None:
    """Check the conditions on answers to problems of any size."""
    if solution.choice is None:
        empty = solution.objective is None and not solution.feasible and solution.gap is None
        require(solver, empty, "an objective without a choice", problem)
        sober = solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        require(solver, sober, f"status {solution.status} without a choice", problem)
    else:
        judged = problem.evaluate(solution.choice)
        require(solver, judged.feasible, f"over budget by {judged.violations}", problem)
        same = (solution.objective, solution.usage, solution.feasible) == (judged.objective, judged.usage, True)
        require(solver, same, f"says {solution.objective}, {solution.usage}; evaluate says {judged}", problem)
        positive = solution.status in (Status.OPTIMAL, Status.FEASIBLE)
        require(solver, positive, f"status {solution.status} with a feasible choice", problem)
    origin = (solution.solver, solution.problem_fingerprint)
    require(
        solver,
        origin == (solver.name, problem.fingerprint()),
        "the answer does not name its solver and problem",
        problem,
    )
    for name, values in (("time", [p.t_s for p in solution.trace]), ("bound", [p.bound for p in solution.trace])):
        reported = [value for value in values if value is not None]
        require(solver, reported == sorted(reported), f"the trace's {name} goes down", problem)
    objectives = [point.objective for point in solution.trace if point.objective is not None]
    require(solver, objectives == sorted(objectives, reverse=True), "the objective rises in the trace", problem)
    for choice, objective in solution.pool:
        judged = problem.evaluate(choice)
        sound = judged.feasible and close(problem, judged.objective, objective)
        require(solver, sound, f"its pool holds {choice} at {objective}; evaluate says {judged}", problem)
    try:
        json.dumps(solution.to_json(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConformanceError(f"{solver.name}: its answer cannot be saved as JSON: {error}") from error


def close(problem: Problem, value: float | None, wanted: float) -> bool:
    """Whether two objectives are equal up to the rounding of their sums (costs, and a factor's squares, can cancel)."""
    largest = float(np.abs(problem.cost).max())
    if problem.pairs.factor is not None:
        largest = max(largest, float(np.square(problem.pairs.factor).sum(axis=1).max()))
    size = 1e-300 + abs(wanted) + largest * problem.num_groups
    return value is not None and abs(value - wanted) <= 1e-9 * size


def require(solver: Solver, holds: bool, message: str, problem: Problem | None = None) -> None:
    """Raise `ConformanceError` with ``message`` unless the condition holds."""
    if not holds:
        fail(solver, message, problem)


def fail(solver: Solver, message: str, problem: Problem | None = None) -> NoReturn:
    """Raise `ConformanceError` with ``message`` and the problem."""
    raise ConformanceError(f"{solver.name}: {message}" + (f" [on {problem!r}]" if problem is not None else ""))


def all_choices(problem: Problem) -> Iterator[NDArray[np.int64]]:
    """Iterate over every choice ``(G,)`` of a small problem."""
    return (np.array(choice) for choice in itertools.product(*(range(len(group)) for group in problem.options)))
