"""An offset changes no choice and hides none: costs are compared without it, and shown with it."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formulations import Problem
from formulations.generators.random_instances import small_problem
from solvers import Status, StopReason, judge, solve
from solvers.search import Progress
from solvers.solution_update import with_known
from solvers.stated_search import StatedSearch
from solvers.sweep import sweep

OFFSETS = st.sampled_from([0.1, -3.0, 1e6 / 3, 1e12, -1e12, 1e15])


def beside(offset: float) -> Problem:
    """Two options, whose costs are equal floats beside an offset of 1e12."""
    return Problem(["a"], [["x", "y"]], [1e-6, 3e-6], {"bytes": [2, 1]}, {}, None, offset)


@pytest.mark.parametrize(
    "solver", ["auto", "brute-force", "dp", "lagrangian", "milp", "cp-sat", "miqp", "semidefinite"]
)
def test_an_offset_hides_no_better_choice(solver: str) -> None:
    found = solve(beside(1e12), solver, initial=[1], time_limit=5, seed=0)
    assert (found.choice.tolist(), found.status) == ([0], Status.OPTIMAL)
    assert found.objective == found.bound == 1e12


@given(seed=st.integers(0, 10**6), offset=OFFSETS, solver=st.sampled_from(["brute-force", "auto", "milp"]))
def test_the_choice_is_that_without_the_offset_and_bounds_are_true(seed: int, offset: float, solver: str) -> None:
    plain = small_problem(seed, max_groups=4).derived(offset=0.0)
    seen: list[Progress] = []
    found = solve(plain.derived(offset=offset), solver, seed=0, time_limit=5, on_progress=seen.append)
    alone = solve(plain, solver, seed=0, time_limit=5)
    assert found.status == alone.status
    if alone.choice is None:
        return
    assert found.choice.tolist() == alone.choice.tolist()
    assert found.objective == plain.derived(offset=offset).evaluate(found.choice).objective
    values = [plain.evaluate(choice) for choice in itertools.product(*(range(len(o)) for o in plain.options))]
    best = Fraction(offset) + min(Fraction(value.objective) for value in values if value.feasible)
    size = Fraction(1e-9 * (1 + np.abs(plain.cost).sum()))
    for point in (*found.trace, *seen, found):
        assert point.bound is None or Fraction(point.bound) <= max(best + size, Fraction(found.objective))
    assert found.bound is None or found.bound <= found.objective


def test_known_bounds_prove_nothing_that_rounding_beside_the_offset_hides() -> None:
    problem = beside(1e12)
    assert with_known(problem, judge(problem, [1]), bounds=[1e12]).status is Status.FEASIBLE
    assert with_known(problem, judge(problem, [1]), choices=[[0]]).choice.tolist() == [0]
    proven = with_known(problem, solve(problem), choices=[[1]])
    assert (proven.status, proven.choice.tolist(), proven.bound) == (Status.OPTIMAL, [0], 1e12)


def test_a_sweep_beside_an_offset_finds_what_it_finds_without() -> None:
    curve = sweep(beside(1e12), "bytes", [1, 2])
    assert [point.solution.choice.tolist() for point in curve.points] == [[1], [0]]
    assert [point.solution.status for point in curve.points] == [Status.OPTIMAL] * 2


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), offset=OFFSETS, seed=st.integers(0, 10**6))
def test_rounding_beside_the_offset_takes_no_bound_of_the_trace_back(values: list[float], offset: float, seed: int):
    rng = np.random.default_rng(seed)
    search = StatedSearch(
        Problem(["a"], [[str(i) for i in range(len(values))]], values, {}, {}, None, offset), solver="x"
    )
    for _ in range(12):
        if rng.random() < 0.5:
            search.offer([rng.integers(len(values))])
        elif search.objective is not None:
            search.raise_bound(search.objective * (1 + rng.integers(-2, 3) * 1e-16))
    bounds = [point.bound for point in search.solution(StopReason.COMPLETED, {}).trace if point.bound is not None]
    assert bounds == sorted(bounds)
