"""Annealing in sweeps, for problems without budgets, against `Problem.evaluate` and brute force."""

import itertools

import numpy as np
import pytest

from formulations.generators.families import random_qubo, signed_pairs, torus_max_cut
from formulations.generators.random_instances import small_problem
from solvers import solve
from solvers.kernels.cooling import Schedule
from solvers.kernels.moves import to_arrays
from solvers.kernels.sweeping import cool_in_sweeps


def without_budgets(seed):
    return small_problem(seed).derived(budgets={})


def cooled(problem, seed, sweeps=50):
    """The best choice of a run from a random choice, its value, and the last choice."""
    a, rng = to_arrays(problem), np.random.default_rng(seed)
    free = np.flatnonzero(np.diff(a.starts) > 1)
    chosen = a.starts[:-1] + rng.integers(0, np.diff(a.starts))
    best, state = chosen.copy(), rng.integers(1, 2**63, size=1, dtype=np.uint64)
    schedule = Schedule(1.0, 0.999, sweeps * len(free), 0.01)
    value = cool_in_sweeps(a, free, chosen, state, schedule, best, np.inf)
    return best - a.starts[:-1], value, chosen - a.starts[:-1]


@pytest.mark.parametrize("seed", range(30))
def test_the_value_is_what_evaluate_says_and_no_choice_of_the_run_is_better(seed):
    problem = without_budgets(seed)
    if (np.diff(problem.group_offsets) < 2).all():
        pytest.skip("nothing to choose")
    best, value, last = cooled(problem, seed)
    assert problem.evaluate(best).objective == pytest.approx(value + problem.offset, abs=1e-9)
    assert problem.evaluate(last).objective >= value + problem.offset - 1e-9


def test_the_same_state_gives_the_same_run_and_another_one_another():
    problem = random_qubo(40, 0.5, seed=3)
    runs = [cooled(problem, seed, sweeps=3)[2].tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("seed", range(25))
def test_anneal_reaches_the_optimum_without_budgets(seed):
    problem = without_budgets(seed)
    every = itertools.product(*map(range, np.diff(problem.group_offsets)))
    least = min(problem.evaluate(choice).objective for choice in every)
    solution = solve(problem, "anneal", seed=seed, sweeps=100, presolve=False)
    assert solution.objective == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize(
    ("problem", "known"),
    [
        (random_qubo(100, 1.0, seed=0), -16880),  # the best of all solvers in `benchmarks.kinds`
        (signed_pairs(12, 3, 4, largest=3, seed=1).derived(budgets={}), None),
        (torus_max_cut(6, 6, seed=0), None),
    ],
)
def test_anneal_is_as_good_as_milp_or_the_best_known(problem, known):
    least = solve(problem, "milp", time_limit=5).objective if known is None else known
    assert solve(problem, "anneal", seed=0, sweeps=1000).objective <= least + 1e-9
