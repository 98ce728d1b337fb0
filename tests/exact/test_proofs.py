"""What is proven stays proven: no bound and no OPTIMAL of one run is contradicted by another with more time or less."""

import itertools

import numpy as np
import pytest
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.generators.random_instances import small_problem
from formulations.reductions.scaling import scaled
from solvers import Status, StopReason, solve
from solvers.base import Search
from solvers.registry import solver_class

QUADRATIC = [("cp-sat", {}), ("milp", {}), ("milp", {"backend": "cbc"}), ("miqp", {}), ("lagrangian", {}), ("auto", {})]
LINEAR = [("dp", {}), *QUADRATIC]


def frustrated(groups: int) -> Problem:
    """Every option of every group meets every other with a random sign: far from any bound for a long time."""
    rng, options = np.random.default_rng(5), 4 * groups
    terms = np.triu(rng.normal(size=(options, options)), 1)
    group_of = np.repeat(np.arange(groups), 4)
    terms[group_of[:, None] == group_of] = 0.0
    use = rng.integers(1, 99, options).astype(float)
    names = [f"g{group}" for group in range(groups)]
    pairs = PairTerms(sparse=scipy.sparse.csr_array(terms))
    return Problem(names, [list("abcd")] * groups, np.zeros(options), {"use": use}, {"use": 35.0 * groups}, pairs)


def crowded(groups: int, budgets: int = 5) -> Problem:
    """Random costs and uses under several budgets that all bind."""
    rng, options = np.random.default_rng(1), 6 * groups
    use = {f"use{k}": rng.integers(1, 1000, options).astype(float) for k in range(budgets)}
    names = [f"g{group}" for group in range(groups)]
    limits = dict.fromkeys(use, 430.0 * groups)
    return Problem(names, [list("abcdef")] * groups, rng.integers(0, 1000, options), use, limits)


def assert_consistent(problem: Problem, solver: str, options: dict[str, str], limits: tuple[float, ...]) -> None:
    if why := solver_class(solver).why_not():
        pytest.skip(why)
    runs = [solve(problem, solver, seed=0, time_limit=seconds, **options) for seconds in limits]
    if solver in ("cp-sat", "milp", "miqp"):  # the others may come to an end of their own without a proof
        assert {run.stop_reason for run in runs if run.status is Status.FEASIBLE} <= {StopReason.TIME_LIMIT}
    rounding = 1e-7 * (1.0 + np.abs(problem.cost).sum())
    for one, other in itertools.product(runs, repeat=2):
        if one.bound is not None and other.objective is not None:
            assert one.bound <= other.objective + rounding, (one.wall_s, other.wall_s)
    for shorter, longer in itertools.pairwise(runs):
        assert longer.choice is not None or shorter.choice is None
        assert longer.status is Status.OPTIMAL or shorter.status is not Status.OPTIMAL


@pytest.mark.parametrize(("solver", "options"), QUADRATIC)
def test_no_proof_is_contradicted_in_short_runs(solver, options):
    assert_consistent(frustrated(14), solver, options, (0.1, 0.3, 0.6))


@pytest.mark.parametrize(("solver", "options"), LINEAR)
def test_no_proof_of_a_linear_problem_is_contradicted_in_short_runs(solver, options):
    assert_consistent(crowded(30), solver, options, (0.1, 0.3, 0.6))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "options"), QUADRATIC)
def test_no_proof_is_contradicted(solver, options):
    assert_consistent(frustrated(60), solver, options, (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "options"), LINEAR)
def test_no_proof_of_a_linear_problem_is_contradicted(solver, options):
    assert_consistent(crowded(100), solver, options, (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0))


def test_cp_sat_proves_nothing_before_its_search_has_begun():
    """Stopped while it presolves it says UNKNOWN and a bound of 0, which lies far above the optimum here."""
    pytest.importorskip("ortools")
    from solvers.exact.cp_sat import _Program

    problem = frustrated(60)
    known = solve(problem, "anneal", seed=0, time_limit=1.0).objective
    program = _Program(problem, None, Search(problem, solver="cp-sat"))
    heard = list(program.solved(Search(problem, solver="cp-sat", time_limit=0.05), 0, 1))
    assert heard[-1] == ("status", "UNKNOWN")
    assert all(program.bound(value) <= known for kind, value in heard if kind == "bound")


def test_nothing_is_left_to_search_where_bound_and_objective_meet_but_for_the_rounding_of_units():
    if why := solver_class("miqp").why_not():
        pytest.skip(why)
    solution = solve(scaled(small_problem(5022), 1e-9).problem, "miqp", presolve=False)  # warnings are errors
    assert (solution.status, solution.bound) == (Status.OPTIMAL, solution.objective)
