"""Two objectives: the front of small problems is the true one; large ones are held against single-budget optima."""

import itertools

import numpy as np
import pytest

from formulations import InfeasibleBudgetError
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled
from solvers import InvalidOptionError, pareto_front, solve


def true_front(problem, resource):
    """Every choice put before `evaluate`; (usage, objective) of those that nothing dominates."""
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    judged = [problem.evaluate(np.array(choice)) for choice in choices]
    found = sorted((one.usage[resource], one.objective) for one in judged if one.feasible)
    front = []
    for usage, objective in found:
        if not front or objective < front[-1][1] - 1e-9:
            front.append((usage, objective))
    return front


def test_the_front_of_small_problems_is_the_true_one():
    tried = 0
    for seed in range(80):
        problem = small_problem(seed)
        if not problem.resources:
            continue
        try:
            front = pareto_front(problem, "r0", population=30, generations=10, seed=0)
        except InfeasibleBudgetError:
            continue
        wanted = true_front(problem, "r0")
        if not len(front):
            assert not wanted or len(problem.budgets) > 1
            continue
        points = [(point.usage, point.objective) for point in front]
        assert points == [pytest.approx(one, abs=1e-9) for one in wanted], seed
        tried += 1
    assert tried > 30


def test_points_are_what_evaluate_says_sorted_and_none_dominates_another():
    problem = layered_problem(40, seed=1)
    front = pareto_front(problem, "bytes", population=40, generations=10, seed=1)
    assert len(front) > 40
    for point in front:
        judged = problem.evaluate(point.choice)
        assert judged.feasible
        assert (judged.objective, judged.usage["bytes"]) == (point.objective, point.usage)
    for a, b in itertools.pairwise(front):
        assert a.usage < b.usage
        assert a.objective > b.objective


def test_the_front_is_near_the_proven_optimum_at_every_budget():
    problem = layered_problem(30, rank=0, seed=2)
    low, high = problem.minimum_usage()["bytes"], float(problem.resources["bytes"].reshape(30, -1).max(axis=1).sum())
    free = problem.with_budgets(bytes=high)
    front = pareto_front(free, "bytes", seed=0, generations=20)
    for share in (0.05, 0.2, 0.4, 0.7):
        budget = low + share * (high - low)
        best = solve(free.with_budgets(bytes=budget), "lagrangian")
        assert front.best_within(budget).objective <= 1.01 * best.objective
    assert front.best_within(low - 1) is None


def test_same_seed_same_front():
    problem = layered_problem(25)
    first, again = (pareto_front(problem, "bytes", seed=3, population=20, generations=5) for _ in range(2))
    assert first.points == again.points


def test_a_time_limit_gives_the_front_so_far():
    front = pareto_front(layered_problem(200), "bytes", seed=0, time_limit=0.5, generations=10**6)
    assert len(front) > 10
    assert front.wall_s < 5.0


def test_objective_numbers_may_have_any_size():
    problem = layered_problem(12, seed=4)
    small = pareto_front(scaled(problem, 1e-12).problem, "bytes", seed=0, population=20, generations=5)
    assert [point.choice for point in small] == [
        point.choice for point in pareto_front(problem, "bytes", seed=0, population=20, generations=5)
    ]


def test_bad_input_is_refused_with_what_would_work():
    problem = layered_problem(3)
    with pytest.raises(InvalidOptionError, match="no resource 'macs'; it has: bytes"):
        pareto_front(problem, "macs")
    with pytest.raises(InvalidOptionError, match="population"):
        pareto_front(problem, "bytes", population=1)
    with pytest.raises(InfeasibleBudgetError):
        pareto_front(problem.with_budgets(bytes=1), "bytes")
