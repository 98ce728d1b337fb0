"""Annealing with budgets: records are within the budgets, and none is missed."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from formulations import Problem
from solvers import solve
from solvers.kernels.cooling import NO_BEST, Schedule, cool
from solvers.kernels.moves import to_arrays
from solvers.kernels.paired_cooling import cool_paired
from solvers.kernels.paired_uses import arrays_of
from solvers.paired_annealing import anneal_paired
from solvers.search import Search
from tests.test_resource_pairs import best_of, paired_problem

SEEDS = st.integers(0, 2**32 - 1)


def test_a_run_from_above_the_budget_records_the_first_choice_within_it() -> None:
    problem = Problem(["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    best, state = np.array([0, 2]), np.ones(1, dtype=np.uint64)
    schedule = Schedule(1.0, 1.0, 200, 0.1)  # a single call
    value = cool(to_arrays(problem), np.arange(2), best.copy(), np.ones(1), state, schedule, best, NO_BEST)
    assert value == pytest.approx(1.0)
    assert best.tolist() == [0, 3]


@given(seed=SEEDS)
@example(seed=260672)  # choices that use the budget to the last unit
@settings(max_examples=30)
def test_records_are_within_the_true_uses_and_have_their_value(seed: int) -> None:
    problem = paired_problem(seed)
    a, uses = arrays_of(problem)
    free = np.flatnonzero(np.diff(a.starts) > 1)
    best, price, state = a.starts[:-1].copy(), np.ones(len(uses.limit)), np.array([seed + 1], dtype=np.uint64)
    value = cool_paired(a, uses, free, best.copy(), price, state, Schedule(1.0, 0.999, 2_000, 0.1), best, NO_BEST)
    judged = problem.evaluate(best - a.starts[:-1])
    assert value < NO_BEST
    assert judged.feasible
    assert judged.objective == pytest.approx(value + problem.offset, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_annealing_with_true_uses_finds_the_optimum_of_few_groups(seed: int) -> None:
    problem = paired_problem(seed, groups=5)
    search = Search(problem, solver="anneal", seed=seed)
    anneal_paired(search, *arrays_of(problem))
    assert search.objective == pytest.approx(best_of(problem), abs=1e-9)
    assert solve(problem, "anneal", seed=seed).objective == pytest.approx(best_of(problem), abs=1e-9)
