"""The problems of the conformance suite: small ones of every kind, degenerate ones, and large ones to watch.

All of them are made from fixed seeds, so that a failure can be seen again.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from solvers.base import Solver
from solvers.testing.judge import require

NUM_RANDOM = 30
SIZES = (300, 60, 20, 10, 7, 3)  # groups


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
    """One group, one option, ties, zero costs, no resource, no budget, a budget met exactly, huge uses.

    The last ones have pair terms: all zero, of rank 0, the whole objective, against each other, beside a huge offset.
    """
    single, couple = ["a"], ["a", "b"]
    xy = ["x", "y"]
    return (
        Problem(single, [["x"]], [3.0], {}, {}),
        Problem(single, [["x"]], [3.0], {"bytes": [7]}, {"bytes": 7}),
        Problem(single, [["x", "y", "z"]], [3.0, -1.0, 2.0], {}, {}),
        Problem(single, [xy], [0.0, 0.0], {"bytes": [1, 1]}, {"bytes": 1}),
        Problem(couple, [["x"], ["x"]], [1.0, 2.0], {"bytes": [1, 2]}, {"bytes": 3}, offset=-3.0),
        Problem(couple, [xy, xy], [0, 0, 0, 0], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}),
        Problem(couple, [xy, xy], [1, 1, 1, 1], {}, {}),
        Problem(couple, [xy, xy], [0, 1, 0, 1], {"bytes": [2, 1, 2, 1]}, {}),
        Problem(couple, [xy, xy], [0, 1, 0, 1], {"bytes": [0, 0, 0, 0]}, {"bytes": 0}),
        Problem(couple, [xy, xy], [0, 1, 0, 1], {"bytes": [2e12, 1e12, 2e12, 1e12]}, {"bytes": 3e12}),
        Problem(couple, [xy, xy], [-5, -6, -5, -6], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}, offset=100.0),
        Problem(couple, [xy, xy], [1e-9, 1e6, 2e-9, 2e6], {"bytes": [2, 1, 2, 1]}, {"bytes": 3}),
        Problem(
            couple, [xy, xy], [0, 1, 0, 1], {"bytes": [2, 1, 2, 1]}, {"bytes": 3}, PairTerms(factor=np.zeros((4, 2)))
        ),
        Problem(
            couple, [xy, xy], [0, 1, 0, 1], {"bytes": [2, 1, 2, 1]}, {"bytes": 3}, PairTerms(factor=np.zeros((4, 0)))
        ),
        Problem(couple, [xy, xy], [0, 0, 0, 0], {}, {}, PairTerms(factor=np.array([[1.0], [-1.0], [1.0], [-1.0]]))),
        Problem(couple, [xy, xy], [0, 0, 0, 0], {}, {}, PairTerms(_one_term(-2.0), np.eye(4)[:, :1])),
        Problem(couple, [xy, xy], [1, 0, 0, 1], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}, PairTerms(_one_term(5.0)), 1e9),
    )


def _one_term(value: float) -> scipy.sparse.csr_array:
    """A sparse pair term of the first options of two groups with two options each."""
    return scipy.sparse.csr_array(([value], ([0], [2])), shape=(4, 4))


@functools.cache
def large_problems(pairs: bool) -> tuple[tuple[Problem, ...], ...]:
    """Three families, each from hard to easy, for what must be seen while a solver works."""
    linear = tuple(_knapsack(size) for size in SIZES)
    if not pairs:
        return (linear,)
    factor = tuple(layered_problem(size, seed=3) for size in SIZES)
    sparse = tuple(layered_problem(size, degree=3, seed=3) for size in SIZES)
    return factor, sparse, linear


def _knapsack(num_groups: int) -> Problem:
    """Linear, with three budgets and costs that follow the uses: hard for whoever enumerates."""
    rng = np.random.default_rng(num_groups)
    uses = rng.integers(1, 1000, size=(3, num_groups, 4)).astype(np.float64)
    low, high = uses.min(axis=2).sum(axis=1), uses.max(axis=2).sum(axis=1)
    names = ("bytes", "macs", "seconds")
    return Problem(
        [f"g{g}" for g in range(num_groups)],
        [["a", "b", "c", "d"]] * num_groups,
        (rng.uniform(0, 100, (num_groups, 4)) - uses.sum(axis=0)).ravel(),
        {name: use.ravel() for name, use in zip(names, uses, strict=True)},
        dict(zip(names, np.floor((low + high) / 2).tolist(), strict=True)),
    )


def _without_pairs(problem: Problem) -> Problem:
    return problem.derived(pairs=PairTerms())


def in_other_units(problem: Problem, unit: float) -> Problem:
    """The same problem with all uses and budgets multiplied."""
    uses = {name: use * unit for name, use in problem.resources.items()}
    budgets = {name: budget * unit for name, budget in problem.budgets.items()}
    fixed = {name: use * unit for name, use in problem.fixed.items()}
    return Problem(problem.groups, problem.options, problem.cost, uses, budgets, problem.pairs, problem.offset, fixed)


def taken(solver: Solver, problems: Sequence[Problem]) -> Iterator[Problem]:
    """The problems that the solver does not refuse; at least one of them."""
    refusals = [solver.refuse(problem) for problem in problems]
    require(solver, not all(refusals), f"refuses every small problem: {refusals[0] if refusals else ''}")
    return (problem for problem, refusal in zip(problems, refusals, strict=True) if not refusal)


def first_taken(solver: Solver) -> Problem:
    """A small random problem."""
    return next(taken(solver, random_problems(solver.native_pairs)))


def largest_taken(solver: Solver) -> list[Problem]:
    """The hardest problem of each family that the solver does not refuse; the easiest if it cannot be stopped."""
    families = [[p for p in family if not solver.refuse(p)] for family in large_problems(solver.native_pairs)]
    require(solver, any(families), "refuses every problem of the suite")
    return [family[0 if solver.honours_time_limit else -1] for family in families if family]
