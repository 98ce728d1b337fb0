"""Nested sweeps: no part of a smaller model is larger than in the next one, so that one file serves all of them.

A chain starts at one end of the sweep, with the choice found there, and solves each further point over the options that
nesting leaves: those that use at most (towards tighter budgets) or at least (towards looser ones) what the last choice
uses in the same group. Both chains are made, and the one that adds less to the objectives is kept. Every point keeps
the bound of the point without nesting, which holds for nested choices too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.reductions.restriction import restrict
from solvers.known import with_known
from solvers.run import judge
from solvers.solution import Solution

Choice = NDArray[np.int64]

SolvePoint = Callable[[Problem, Choice | None], Solution]
"""Solves a problem from a choice to start from, or none."""


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
    """Solutions of the points, tightest budget first, whose choices are nested in each other.

    Points without a choice stay as they are and are left out of the nesting.
    """
    solved = [number for number, point in enumerate(points) if point.solution.choice is not None]
    upwards = _chain([points[number] for number in solved], resource, solve_point, upwards=True)
    downwards = _chain([points[number] for number in reversed(solved)], resource, solve_point, upwards=False)[::-1]
    plain = [points[number].solution for number in solved]
    chains = [chain for chain in (downwards, upwards) if all(solution.choice is not None for solution in chain)]
    best = min(chains, key=lambda chain: _excess(chain, plain))
    found = dict(zip(solved, best, strict=True))
    return [found.get(number, point.solution) for number, point in enumerate(points)]


def _chain(points: Sequence[Point], resource: str, solve_point: SolvePoint, *, upwards: bool) -> list[Solution]:
    """Solutions in the order of the points, each within what the one before leaves."""
    chain: list[Solution] = []
    for point in points:
        last = chain[-1].choice if chain else None
        chain.append(point.solution if last is None else _next(point, resource, last, solve_point, upwards=upwards))
    return chain


def _next(point: Point, resource: str, last: Choice, solve_point: SolvePoint, *, upwards: bool) -> Solution:
    """The solution that is nested with the last choice; the point's own one where that is."""
    problem, own = point.problem, point.solution.choice
    pair = (last, own) if upwards else (own, last)
    if own is not None and is_nested(problem, resource, *pair):
        return point.solution
    use, used = problem.resources[resource], problem.resources[resource][problem.flat(last)][problem.group_of]
    reduction = restrict(problem, use >= used if upwards else use <= used)
    start = reduction.lower(last) if problem.evaluate(last).feasible else None
    found = solve_point(reduction.problem, start)
    choices = [] if found.choice is None else [reduction.lift(found.choice)]
    judged = judge(problem, (choices or [last])[0], name=found.solver)
    run = replace(
        found, pool=(), **{name: getattr(judged, name) for name in ("choice", "objective", "usage", "feasible")}
    )
    run = replace(run, bound=None, gap=None, status=judged.status, problem_fingerprint=problem.fingerprint())
    return with_known(problem, run, bounds=[point.solution.bound])


def _excess(chain: Sequence[Solution], plain: Sequence[Solution]) -> float:
    """What nesting adds to the objectives, each relative to its size without nesting, in all."""
    pairs = [(one.objective, other.objective) for one, other in zip(chain, plain, strict=True)]
    return sum((a - b) / (abs(b) or 1.0) for a, b in pairs if a is not None and b is not None)
