"""`semidefinite` proves what brute force finds, keeps its bound valid when cut, and resumes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import PairTerms, Problem
from formulations.generators.families import member
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import Status, UnsupportedProblemError, solve
from solvers.base import Search
from solvers.exact import semidefinite
from solvers.exact.semidefinite import Semidefinite, objective_step
from tests.quick import slow_but

DENSE = [
    ("random_max_cut", {"vertices": 22, "density": 0.6}),
    ("random_qubo", {"variables": 24, "density": 1.0}),
    ("quadratic_knapsack", {"items": 20, "density": 0.5}),
    ("dense_pairs", {"groups": 10, "options": 3}),
]


@pytest.fixture(autouse=True)
def _few_enumerated(monkeypatch):
    monkeypatch.setattr("solvers.exact.semidefinite.FEW_CHOICES", 8)  # so that small problems are branched


@pytest.mark.parametrize(("family", "arguments"), DENSE, ids=[family for family, _ in DENSE])
@pytest.mark.parametrize("seed", slow_but([0], [0, 1]))
def test_it_proves_the_optimum(family, arguments, seed):
    problem = member(family, {**arguments, "seed": seed})
    reference = solve(problem, "brute-force")
    solution = solve(problem, "semidefinite", seed=0)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(reference.objective, rel=1e-9)


@given(st.integers(0, 20_000))
@settings(max_examples=25, deadline=None)
def test_small_problems_of_all_kinds(seed):
    problem = small_problem(seed)
    reference, solution = solve(problem, "brute-force"), solve(problem, "semidefinite", seed=0)
    assert solution.status is reference.status
    if reference.objective is not None:
        assert solution.objective == pytest.approx(reference.objective, rel=1e-9, abs=1e-12)


def cut_search(problem, nodes):
    """A search whose clock ends it in a later node; it starts from a bad choice."""
    search = Search(problem, solver="semidefinite", seed=0)
    search.offer(np.zeros(problem.num_groups, dtype=np.int64))
    search.raise_bound(-1e9)
    looks = iter(range(1_000_000))
    search.expired = lambda: next(looks) > nodes
    return search


@pytest.mark.parametrize("looks", [0, 1, 3, 7, 20])
def test_a_cut_search_has_a_valid_bound_and_resumes_to_the_optimum(looks):
    problem = member("random_max_cut", {"vertices": 18, "density": 0.7, "seed": 3})
    optimum = solve(problem, "brute-force").objective
    search = cut_search(problem, looks)
    Semidefinite().run(problem, search)
    assert search.bound is not None
    assert search.bound <= optimum + 1e-9
    search.expired = lambda: False
    Semidefinite().run(problem, search)
    assert search.proven()
    assert search.objective == pytest.approx(optimum)


def test_a_node_that_exceeds_its_budget_is_closed():
    use = np.array([0.0, 5, 0, 5, 0, 5])
    pairs = PairTerms(factor=np.arange(6.0)[:, None])
    problem = Problem(list("abc"), [["0", "1"]] * 3, [0, -30, 0, -30, 0, -30], {"w": use}, {"w": 9}, pairs)
    solution = solve(problem, "semidefinite", presolve=False)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(solve(problem, "brute-force").objective)


def test_a_step_is_found_only_where_it_divides_every_difference():
    whole = member("random_max_cut", {"vertices": 8, "density": 0.9, "seed": 0})
    search = Search(whole, solver="semidefinite")
    step = objective_step(search)
    rng = np.random.default_rng(0)
    values = {whole.evaluate(rng.integers(0, 2, 8)).objective for _ in range(50)}
    assert step > 0
    assert all(((value - min(values)) / step).is_integer() for value in values)
    assert objective_step(Search(layered_problem(4), solver="semidefinite")) == 0.0


def test_large_problems_are_refused(monkeypatch):
    monkeypatch.setattr(semidefinite, "MAX_OPTIONS", 30)
    with pytest.raises(UnsupportedProblemError, match="takes up to 30 options"):
        solve(layered_problem(20), "semidefinite")


def test_auto_without_a_time_limit_comes_to_an_end(monkeypatch):
    monkeypatch.setattr("solvers.composites.auto.EXACT_S", 0.2)
    problem = member("random_max_cut", {"vertices": 60, "density": 0.9, "seed": 0})
    solution = solve(problem, "auto", seed=0)
    turns = [turn["solver"] for turn in solution.details["turns"]]
    assert "semidefinite" in turns
    assert solution.bound is not None
