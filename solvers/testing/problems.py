"""The problems of the conformance suite: small ones of every kind, degenerate ones, and large ones to watch.

All of them are made from fixed seeds, so that a failure can be seen again.
"""

import functools
from collections.abc import Iterator, Sequence

from formulations import Problem
from formulations.instances import layered_problem, small_problem
from solvers.base import Solver
from solvers.testing.judge import require

NUM_RANDOM = 30


@functools.cache
def random_problems(pairs: bool) -> tuple[Problem, ...]:
    """Small problems of every kind; without pair terms when the solver takes none."""
    drawn = (small_problem(seed, max_groups=5, max_options=3) for seed in range(NUM_RANDOM))
    return tuple(problem if pairs else _without_pairs(problem) for problem in drawn)


@functools.cache
def middle_problem(pairs: bool) -> Problem:
    """Too large to try by hand, small enough for everybody; without ties."""
    return layered_problem(7, bits=(2, 4, 8), rank=2 if pairs else 0, seed=5)


@functools.cache
def degenerate_problems() -> tuple[Problem, ...]:
    """One group, one option, ties, zero costs, no resource, no budget, a budget met exactly, huge uses."""
    one, two = ["a"], ["a", "b"]
    xy = ["x", "y"]
    return (
        Problem(one, [["x"]], [3.0], {}, {}),
        Problem(one, [["x"]], [3.0], {"bytes": [7]}, {"bytes": 7}),
        Problem(one, [["x", "y", "z"]], [3.0, -1.0, 2.0], {}, {}),
        Problem(one, [xy], [0.0, 0.0], {"bytes": [1, 1]}, {"bytes": 1}),
        Problem(two, [["x"], ["x"]], [1.0, 2.0], {"bytes": [1, 2]}, {"bytes": 3}, offset=-3.0),
        Problem(two, [xy, xy], [0, 0, 0, 0], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}),
        Problem(two, [xy, xy], [1, 1, 1, 1], {}, {}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [2, 1, 2, 1]}, {}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [0, 0, 0, 0]}, {"bytes": 0}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [2e12, 1e12, 2e12, 1e12]}, {"bytes": 3e12}),
        Problem(two, [xy, xy], [-5, -6, -5, -6], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}, offset=100.0),
        Problem(two, [xy, xy], [1e-9, 1e6, 2e-9, 2e6], {"bytes": [2, 1, 2, 1]}, {"bytes": 3}),
    )


@functools.cache
def large_problems(pairs: bool) -> tuple[Problem, ...]:
    """From hard to easy, for what must be seen while a solver works."""
    sizes = (300, 60, 20, 10)
    forms = ((8, 0), (8, 3)) if pairs else ((0, 0),)
    layered = [layered_problem(size, rank=rank, degree=degree, seed=3) for size in sizes for rank, degree in forms]
    return (*layered, *(layered_problem(size, bits=(2, 4, 8), rank=2 if pairs else 0, seed=3) for size in (10, 7)))


def _without_pairs(problem: Problem) -> Problem:
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    return Problem(problem.groups, problem.options, problem.cost, resources, budgets, offset=problem.offset)


def taken(solver: Solver, problems: Sequence[Problem]) -> Iterator[Problem]:
    """The problems that the solver does not refuse; at least one of them."""
    refusals = [solver.refuse(problem) for problem in problems]
    require(solver, not all(refusals), f"refuses every small problem: {refusals[0] if refusals else ''}")
    return (problem for problem, refusal in zip(problems, refusals, strict=True) if not refusal)


def first_taken(solver: Solver) -> Problem:
    """A small random problem."""
    return next(taken(solver, random_problems(solver.native_pairs)))


def largest_taken(solver: Solver) -> Problem:
    """The hardest of `large_problems` that it does not refuse."""
    return next(taken(solver, large_problems(solver.native_pairs)))
