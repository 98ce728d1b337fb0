"""The genetic algorithm: feasible, seeded, and near the optimum of small problems."""

import itertools
from functools import partial

import numpy as np
import pytest

from formulations import InfeasibleBudgetError
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import InvalidOptionError, Status, StopReason, run
from solvers.base import Search
from solvers.heuristic.genetic_operators import ChoiceSpace
from solvers.kernels.moves import judge_all, to_arrays

solve = partial(run.solve, presolve=False)  # the back end itself is tested


def test_ga_reaches_the_optimum_of_small_problems():
    for seed in range(30):
        problem = small_problem(seed)
        choices = itertools.product(*map(range, np.diff(problem.group_offsets)))
        best = min((one.objective for one in map(problem.evaluate, choices) if one.feasible), default=None)
        try:
            solution = solve(problem, "ga", seed=seed, population=20, generations=40)
        except InfeasibleBudgetError:
            assert best is None
            continue
        if best is None:
            assert solution.status is Status.UNKNOWN
        else:
            assert solution.objective == pytest.approx(best, abs=1e-9)


def test_populations_are_judged_as_the_problem_judges_each_choice():
    for seed in range(20):
        problem = small_problem(seed)
        choices = np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets), (7, problem.num_groups))
        values, excess = judge_all(to_arrays(problem), problem.flat(choices))
        evaluations = [problem.evaluate(choice) for choice in choices]
        assert values + problem.offset == pytest.approx([one.objective for one in evaluations], abs=1e-9)
        assert (excess == 0).tolist() == [one.feasible for one in evaluations]


def test_children_over_budget_are_repaired():
    problem = layered_problem(30)
    chosen = problem.flat(np.random.default_rng(0).integers(0, 6, (10, 30)))
    chosen[0] = problem.flat(np.full(30, 5))
    improved = ChoiceSpace(problem, Search(problem, solver="ga")).improved(chosen)
    assert (judge_all(to_arrays(problem), improved)[1] == 0).all()


def test_a_first_population_without_time_begins_with_the_cheapest_options():
    problem = layered_problem(30)
    first = ChoiceSpace(problem, Search(problem, solver="ga", time_limit=1e-9)).first(10)
    greedy = solve(problem, "greedy")
    assert problem.evaluate(first[0]).objective <= 1.2 * greedy.objective


def test_same_seed_same_answer():
    problem = layered_problem(25)
    first, again = (solve(problem, "ga", seed=3, generations=30) for _ in range(2))
    assert first.choice.tolist() == again.choice.tolist()


def test_generations_pay():
    problem = layered_problem(60)
    few, many = (solve(problem, "ga", seed=0, generations=n).details["objective_before_polish"] for n in (1, 40))
    assert many < 0.99 * few


def test_ga_stops_at_the_time_limit():
    solution = solve(layered_problem(300), "ga", seed=0, time_limit=0.4, generations=1_000_000)
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert solution.feasible


@pytest.mark.parametrize(("option", "value"), [("population", 1), ("generations", 0)])
def test_impossible_options_are_refused(option, value):
    with pytest.raises(InvalidOptionError, match=option):
        solve(layered_problem(3), "ga", **{option: value})
