"""Nested sweeps: no part of a smaller model is larger than in the next larger model, so that one file serves all.

A chain starts at one end of the sweep with the choice found there. Each further point is solved over the options that
nesting allows: towards tighter budgets, options that use at most what the previous choice uses in the same group;
towards looser budgets, options that use at least as much. Chains are made in both directions, and the chain that adds
less to the objectives is kept. Every point keeps its bound without nesting, which is valid for nested choices too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.reductions.restriction import restrict
from solvers.run import judge
from solvers.solution import Solution
from solvers.solution_update import with_known

Choice = NDArray[np.int64]

SolvePoint = Callable[[Problem, Choice | None], Solution]
"""Function that solves a problem, given a choice to start from or None."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """A problem at its budget, and the solution without nesting."""

    problem: Problem
    solution: Solution


def is_nested(problem: Problem, resource: str, smaller: ArrayLike, larger: ArrayLike) -> bool:
    """Whether no group uses more of the resource in the smaller choice ``(G,)`` than in the larger one.

    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {"bytes": [8, 4, 8, 4]}, {})
    >>> is_nested(problem, "bytes", [1, 1], [0, 1]), is_nested(problem, "bytes", [1, 0], [0, 1])
    (True, False)
    """
    use = problem.resources[resource]
    return bool((use[problem.flat(smaller)] <= use[problem.flat(larger)]).all())


def nested(points: Sequence[Point], resource: str, solve_point: SolvePoint) -> list[Solution]:
    """Return solutions of the points, tightest budget first, whose choices are nested in each other.

    Points without a choice are returned unchanged and ignored in the nesting.
    """
    solved = [number for number, point in enumerate(points) if point.solution.choice is not None]
    upwards = _chain([points[number] for number in solved], resource, solve_point, upwards=True)
    downwards = _chain([points[number] for number in reversed(solved)], resource, solve_point, upwards=False)[::-1]
    plain = [points[number].solution for number in solved]
    chains = [chain for chain in (downwards, upwards) if all(solution.choice is not None for solution in chain)]
    best = min(chains, key=lambda chain: _excess(chain, plain))
    nested_solutions = dict(zip(solved, best, strict=True))
    return [nested_solutions.get(number, point.solution) for number, point in enumerate(points)]


def _chain(points: Sequence[Point], resource: str, solve_point: SolvePoint, *, upwards: bool) -> list[Solution]:
    """Return solutions in the order of the points, each nested with the one before."""
    chain: list[Solution] = []
    for point in points:
        last = chain[-1].choice if chain else None
        chain.append(point.solution if last is None else _next(point, resource, last, solve_point, upwards=upwards))
    return chain


def _next(point: Point, resource: str, last: Choice, solve_point: SolvePoint, *, upwards: bool) -> Solution:
    """Return a solution nested with the last choice; the point's solution if it is nested already."""
    problem, free = point.problem, point.solution.choice
    pair = (last, free) if upwards else (free, last)
    if free is not None and is_nested(problem, resource, *pair):
        return point.solution
    use, used = problem.resources[resource], problem.resources[resource][problem.flat(last)][problem.group_of]
    reduction = restrict(problem, use >= used if upwards else use <= used)
    start = reduction.lower(last) if problem.evaluate(last).feasible else None
    reduced = solve_point(reduction.problem, start)
    choice = last if reduced.choice is None else reduction.lift(reduced.choice)
    judged = judge(problem, choice, name=reduced.solver)
    run = replace(
        reduced, pool=(), **{name: getattr(judged, name) for name in ("choice", "objective", "usage", "feasible")}
    )
    bound = point.solution.bound  # those of the trace hold for the options that nesting allows only
    trace = tuple(state._replace(bound=bound) for state in run.trace)
    run = replace(
        run, bound=None, gap=None, status=judged.status, trace=trace, problem_fingerprint=problem.fingerprint()
    )
    return with_known(problem, run, bounds=[point.solution.bound])


def _excess(chain: Sequence[Solution], plain: Sequence[Solution]) -> float:
    """Return the sum of the relative increases of the objectives due to nesting."""
    pairs = [(constrained.objective, free.objective) for constrained, free in zip(chain, plain, strict=True)]
    return sum((a - b) / (abs(b) or 1.0) for a, b in pairs if a is not None and b is not None)
