"""The problems of the conformance suite: small ones of every kind, degenerate ones, and large ones for long runs.

All of them are made from fixed seeds, so that failures are reproducible.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from types import MappingProxyType

import numpy as np
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.validation import frozen
from solvers.base import Solver
from solvers.testing.judge import require

NUM_RANDOM = 30
NUM_PAIRED = 8
SIZES = (300, 60, 20, 10, 7, 3)  # numbers of groups


@functools.cache
def random_problems(pairs: bool) -> tuple[Problem, ...]:
    """Return small problems of every kind, without pair terms if the solver does not support them."""
    drawn = (small_problem(seed, max_groups=5, max_options=3) for seed in range(NUM_RANDOM))
    return tuple(problem if pairs else _without_pairs(problem) for problem in drawn)


@functools.cache
def middle_problem(pairs: bool) -> Problem:
    """Return a problem that is too large to enumerate but small enough for every solver, without ties."""
    return layered_problem(7, bits=(2, 4, 8), rank=2 if pairs else 0, seed=5)


@functools.cache
def known_problems(pairs: bool) -> tuple[Problem, ...]:
    """Return problems of 1,024 choices whose optimum is known, with a wide and with a tight budget."""
    rank = 2 if pairs else 0
    return tuple(layered_problem(5, bits=(2, 3, 4, 8), rank=rank, budget=budget, seed=7) for budget in (0.5, 0.1))


@functools.cache
def degenerate_problems() -> tuple[Problem, ...]:
    """Return problems with one group, one option, ties, zero costs, no resource, no budget, a tight budget, huge uses.

    The last ones have pair terms: all zero, of rank 0, as the whole objective, of opposite signs, with a huge offset.
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
    """Return a sparse pair term between the first options of two groups with two options each."""
    return scipy.sparse.csr_array(([value], ([0], [2])), shape=(4, 4))


@functools.cache
def large_problems(pairs: bool) -> tuple[tuple[Problem, ...], ...]:
    """Return three families, each from hard to easy, for checks of a solver's behaviour during a run."""
    linear = tuple(_knapsack(size) for size in SIZES)
    if not pairs:
        return (linear,)
    factor = tuple(layered_problem(size, seed=3) for size in SIZES)
    sparse = tuple(layered_problem(size, degree=3, seed=3) for size in SIZES)
    return factor, sparse, linear


def _knapsack(num_groups: int) -> Problem:
    """Return a linear problem with three budgets and costs correlated with the uses, which is hard to enumerate."""
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


@functools.cache
def paired_problems(pairs: bool) -> tuple[Problem, ...]:
    """Return tiny problems whose budgets have pair terms, without those of the objective unless ``pairs``.

    In the first one, a budget that counts every pair term is never met, and one that counts none is always met.
    """
    use = {"bytes": [4, 3, 4, 3]}
    terms = {"bytes": _one_term(5.0)}
    couple = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 2], use, {"bytes": 9}, resource_pairs=terms)
    drawn = (small_problem(seed, max_groups=3, max_options=3, resource_pairs=True) for seed in itertools.count())
    random = itertools.islice((problem for problem in drawn if problem.paired_budgets), NUM_PAIRED)
    return (couple, *(problem if pairs else _without_pairs(problem) for problem in random))


def _without_pairs(problem: Problem) -> Problem:
    return problem.derived(pairs=PairTerms())


def in_other_units(problem: Problem, unit: float) -> Problem:
    """Return the same problem with all uses and budgets multiplied by ``unit``."""
    return problem.derived(
        resources=MappingProxyType({name: frozen(use * unit) for name, use in problem.resources.items()}),
        budgets=MappingProxyType({name: budget * unit for name, budget in problem.budgets.items()}),
        fixed=MappingProxyType({name: use * unit for name, use in problem.fixed.items()}),
        resource_pairs=MappingProxyType({name: terms * unit for name, terms in problem.resource_pairs.items()}),
    )


def taken(solver: Solver, problems: Sequence[Problem]) -> Iterator[Problem]:
    """Yield the problems that the solver does not refuse; there must be at least one."""
    refusals = [solver.refuse(problem) for problem in problems]
    require(solver, not all(refusals), f"refuses every small problem: {refusals[0] if refusals else ''}")
    return (problem for problem, refusal in zip(problems, refusals, strict=True) if not refusal)


def first_taken(solver: Solver) -> Problem:
    """Return a small random problem that the solver does not refuse."""
    return next(taken(solver, random_problems(solver.native_pairs)))


def largest_taken(solver: Solver) -> list[Problem]:
    """Return the hardest problem of each family that the solver accepts; the easiest if it cannot be stopped."""
    families = [[p for p in family if not solver.refuse(p)] for family in large_problems(solver.native_pairs)]
    require(solver, any(families), "refuses every problem of the suite")
    return [family[0 if solver.honours_time_limit else -1] for family in families if family]
