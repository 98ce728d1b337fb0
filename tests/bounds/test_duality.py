"""Dual bounds: never above the optimum, and as tight as theory says where it says so."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers.bounds.dual
from formulations import Problem
from formulations.generators.random_instances import channel_problem, layered_problem, small_problem
from formulations.reductions.scaling import scaled
from solvers import Status, solve
from solvers.base import Search
from solvers.bounds.dual import Dual
from solvers.bounds.duality import dual_bound, largest_objective, raise_dual_bound
from solvers.bounds.learned import learned
from solvers.bounds.pareto_lists import Core


def rounding(problem: Problem) -> float:
    return 1e-9 * (1.0 + np.abs(problem.cost).sum())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_no_choice_is_below_the_bound(seed):
    problem = small_problem(seed)
    best = solve(problem, "brute-force").objective
    if best is not None:
        assert dual_bound(problem).value <= best + rounding(problem)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_every_point_of_the_dual_gives_a_bound_and_reduced_costs(seed, other):
    """Not only the best multipliers: any prices ≥ 0, any direction, any messages."""
    problem = small_problem(seed, max_groups=4)
    dual = Dual(problem)
    point = np.random.default_rng(other).normal(0.0, 1.0, dual.size)
    budgets = len(problem.budgets)
    point[:budgets] = np.abs(point[:budgets])
    bound = dual.bound(point)
    sizes = [len(options) for options in problem.options]
    for choice in np.ndindex(*sizes):
        judged = problem.evaluate(choice)
        if judged.feasible:
            assert judged.objective >= bound.value + bound.reduced[problem.flat(choice)].max() - rounding(problem)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_a_bound_above_every_objective_is_met_only_without_a_feasible_choice(seed):
    problem = small_problem(seed)
    found = solve(problem, "brute-force")
    if dual_bound(problem).value > largest_objective(problem):
        assert found.status is Status.INFEASIBLE
    if found.objective is not None:
        assert found.objective <= largest_objective(problem)


@pytest.mark.parametrize("degree", [0, 3])
def test_prices_of_several_budgets_found_by_temperature_are_the_linear_program_s(monkeypatch, degree):
    rng, problem = np.random.default_rng(1), layered_problem(200, rank=0, degree=degree, seed=4)
    use = {name: rng.integers(1, 100, problem.num_options).astype(float) for name in ("macs", "time")}
    both = problem.resources | use
    limited = problem.derived(resources=both, budgets=problem.budgets | {"macs": 9000.0, "time": 9000.0})
    exact = dual_bound(limited).value
    monkeypatch.setattr("solvers.bounds.dual.LINEAR_PROGRAM", 0)
    found = dual_bound(limited).value
    assert found <= exact + rounding(limited) or degree
    assert found == pytest.approx(exact, rel=1e-5 if not degree else 1e-2)


@pytest.mark.parametrize("num_budgets", [1, 2, 3])
def test_linear_bound_is_the_linear_program_s(num_budgets):
    rng = np.random.default_rng(num_budgets)
    groups, options = 30, 5
    uses = {f"r{k}": rng.integers(1, 50, groups * options).astype(float) for k in range(num_budgets)}
    budgets = {name: float(use.reshape(groups, options).mean(axis=1).sum() * 0.8) for name, use in uses.items()}
    cost = rng.random(groups * options)
    problem = Problem([f"g{g}" for g in range(groups)], [list("abcde")] * groups, cost, uses, budgets)
    relaxed = scipy.optimize.linprog(
        cost,
        A_ub=np.array(list(uses.values())),
        b_ub=list(budgets.values()),
        A_eq=np.kron(np.eye(groups), np.ones(options)),
        b_eq=np.ones(groups),
    )
    assert dual_bound(problem).value == pytest.approx(relaxed.fun, rel=1e-8)


def test_price_tells_what_a_larger_budget_saves():
    problem = layered_problem(300, rank=0, seed=2)
    bound = dual_bound(problem)
    more = problem.with_budgets(bytes=problem.budgets["bytes"] + 100.0)
    saved = bound.value - dual_bound(more).value
    assert 0 < saved <= 100.0 * bound.prices["bytes"] * (1 + 1e-9)


def test_factor_bound_is_within_a_few_percent_of_a_good_choice():
    problem = layered_problem(500, seed=1)
    bound, best = dual_bound(problem), solve(problem, "anneal", seed=0, sweeps=300, population=2, generations=2)
    assert bound.value <= best.objective
    assert best.objective - bound.value < 0.05 * best.objective
    assert bound.direction.shape == (8,)


def test_sparse_bound_is_near_the_linearised_program_s():
    problem = layered_problem(20, degree=3, seed=4)
    optimum = solve(problem, "milp")
    assert optimum.status is Status.OPTIMAL
    bound = dual_bound(problem).value
    assert 0.9 * optimum.objective < bound <= optimum.objective


def test_without_time_the_bound_is_still_valid():
    problem = layered_problem(30, degree=3, seed=4)
    best = solve(problem, "greedy").objective
    hurried, patient = dual_bound(problem, time_limit=0.0).value, dual_bound(problem).value
    assert hurried <= patient <= best


def test_multipliers_of_a_sample_lead_to_the_same_bound(monkeypatch):
    problem = channel_problem(3000, per_layer=100, rank=8)
    whole = dual_bound(problem)
    monkeypatch.setattr(solvers.bounds.dual, "SAMPLE", 750)
    sampled = dual_bound(problem)
    assert sampled.value == pytest.approx(whole.value, rel=1e-4)
    objective = solve(problem, "lagrangian", seed=0).objective
    assert max(sampled.value, whole.value) <= objective <= 1.002 * whole.value


def test_core_leaves_out_only_options_that_cannot_improve_the_incumbent():
    problem = small_problem(11)
    problem = Problem(problem.groups, problem.options, problem.cost, problem.resources, problem.budgets)
    best = solve(problem, "brute-force")
    bound = dual_bound(problem)
    core = Core.of(problem, bound, best.objective - bound.value + 1e-9)
    kept = set(core.options.tolist()) | set(core.base.tolist())
    assert set(problem.flat(best.choice).tolist()) <= kept


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_prices_are_in_the_problems_own_unit(scale):
    problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    prices = solve(scaled(problem, scale).problem, "lagrangian", presolve=False).details["prices"]
    assert prices["bytes"] == pytest.approx(0.25 * scale)


@pytest.mark.parametrize("arguments", [{"rank": 4}, {"degree": 4}], ids=["factor", "sparse"])
def test_an_ascent_that_time_cuts_goes_on_and_ends_where_one_does_that_is_not_cut(arguments):
    problem = layered_problem(60, seed=2, **arguments)
    whole, search = dual_bound(problem).value, Search(problem, solver="test", time_limit=1000.0)
    values = []
    for _ in range(1000):
        values.append(raise_dual_bound(problem, search, 1e-5).value)  # some 10 ms
        if learned(search).dual is not None:
            break
    assert learned(search).dual is not None
    assert max(values) >= whole - 1e-3 * abs(whole)  # cuts end its stages at other points
    assert search.bound == max(values)
