"""Wrappers are solvers: they pass the suite, pickle, compare, and say what each part did."""

import pickle

import dimod
import pytest

from formulations.generators.random_instances import layered_problem
from solvers import (
    InvalidOptionError,
    MultiStart,
    Polish,
    Status,
    StopReason,
    UnknownSolverError,
    UnsupportedProblemError,
    solve,
)
from solvers.compare.runs import compare
from solvers.heuristic.anneal import Anneal
from solvers.testing import check_solver

QUICK = Anneal(sweeps=50, population=2, generations=1)


def test_wrappers_pass_the_conformance_suite():
    for wrapper in (MultiStart("greedy", starts=2), Polish("greedy")):
        assert "check_same_seed_same_answer" in check_solver(wrapper)


def test_a_wrapper_has_the_abilities_of_what_it_holds():
    assert MultiStart("milp").exact
    assert not MultiStart("anneal").exact
    assert MultiStart("leap-cqm").needs_network
    assert not Polish(dimod.ExactSolver()).deterministic
    with pytest.raises(UnknownSolverError, match="nobody"):
        Polish("nobody")
    with pytest.raises(UnsupportedProblemError, match="'dp' takes no pair terms"):
        solve(layered_problem(3), MultiStart("dp"))


def test_wrappers_nest_and_are_compared_under_their_own_names():
    solvers = [MultiStart(QUICK, starts=2), Polish(MultiStart("greedy", starts=1)), MultiStart("greedy")]
    comparison = compare(layered_problem(8), solvers, seeds=(0, 1))
    names = {row.label for row in comparison.rows()}
    assert names == {
        "multi-start(anneal(sweeps=50, population=2, generations=1))(starts=2)",
        "polish(multi-start(greedy)(starts=1))",
        "multi-start(greedy)",
    }


def test_multi_start_keeps_the_best_of_independent_starts():
    problem = layered_problem(60)
    solution = solve(problem, MultiStart(QUICK, starts=5), seed=3)
    found = [start["objective"] for start in solution.details["starts"]]
    assert solution.objective == pytest.approx(min(found))
    assert len(set(found)) > 1  # the seeds differ
    assert len({start["seed"] for start in solution.details["starts"]}) == 5


def test_the_first_proof_ends_a_multi_start():
    solution = solve(layered_problem(30, rank=0), MultiStart("lagrangian", starts=50))
    assert solution.status is Status.OPTIMAL
    assert len(solution.details["starts"]) == 1


def test_a_time_limit_is_shared_and_named():
    solution = solve(layered_problem(200), MultiStart("anneal", starts=3), time_limit=3.0, seed=0)
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert len(solution.details["starts"]) == 3


def test_polish_reports_what_each_step_brought():
    problem = layered_problem(100)
    solution = solve(problem, Polish("greedy"), seed=0)
    objectives = [step["objective"] for step in solution.details["steps"]]
    assert [step["solver"] for step in solution.details["steps"]] == ["greedy", "anneal", "polish"]
    assert objectives[0] == pytest.approx(solve(problem, "greedy").objective)
    assert solution.objective == pytest.approx(min(objectives))
    assert solution.objective < 0.99 * objectives[0]


def test_an_option_out_of_range_is_refused():
    with pytest.raises(InvalidOptionError, match="starts"):
        MultiStart("sa", starts=0)


def test_pickled_wrappers_are_the_same():
    for wrapper in (MultiStart(QUICK), Polish("sa")):
        copy = pickle.loads(pickle.dumps(wrapper))
        assert (copy, copy.name, copy.exact) == (wrapper, wrapper.name, wrapper.exact)
