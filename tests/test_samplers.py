"""dimod samplers as solvers, and simulated annealing on the QUBO."""

from functools import partial

import dimod
import dwave.samplers
import numpy as np
import pytest

from formulations.instances import layered_problem, small_problem
from solvers import InvalidOptionError, Status, StopReason, run
from solvers.anneal import Anneal
from solvers.repair import repair
from solvers.sa import beta_range
from solvers.samplers import from_sampler

solve = partial(run.solve, presolve=False)  # the back end itself is tested


@pytest.fixture(scope="module")
def problem():
    return layered_problem(12, seed=5)


@pytest.fixture(scope="module")
def best(problem):
    return solve(problem, Anneal(), seed=0).objective


@pytest.mark.parametrize("encoding", ["one-hot", "domain-wall"])
def test_sa_reaches_the_best_known_after_polish(problem, best, encoding):
    solution = solve(problem, "sa", seed=1, encoding=encoding)
    assert solution.status is Status.FEASIBLE
    assert solution.objective <= 1.03 * best


@pytest.mark.parametrize("name", ["sqa", "tabu"])
def test_other_samplers_by_name_come_near_the_best_known(problem, best, name):
    solution = solve(problem, name, seed=1)
    assert solution.objective <= 1.05 * best
    assert solution.choice.tolist() == solve(problem, name, seed=1).choice.tolist()


def test_each_step_is_reported_and_never_worse_than_the_one_before(problem):
    details = solve(problem, "sa", seed=1, encoding="one-hot", rounds=6).details
    steps = [details[f"objective_{name}"] for name in ("decoded", "repaired", "polished")]
    assert steps == sorted(steps, reverse=True)
    assert details["samples"] == 60
    assert 0 < details["share_feasible_decoded"] <= 1
    assert details["share_feasible_raw"] <= details["share_valid"] <= 1
    assert set(details["prices"]) == {"bytes"}


def test_sa_is_feasible_whenever_repair_can_be():
    for seed in range(40):
        problem = small_problem(seed, max_groups=4)
        if problem.budgets and repair(problem, np.zeros(problem.num_groups, dtype=int)) is None:
            continue
        assert solve(problem, "sa", seed=seed, rounds=2, num_reads=2, num_sweeps=10).feasible


def test_same_seed_same_answer(problem):
    first, again = (solve(problem, "sa", seed=7, rounds=3) for _ in range(2))
    assert first.choice.tolist() == again.choice.tolist()
    assert first.details == again.details


def test_sa_stops_at_the_time_limit():
    solution = solve(layered_problem(150), "sa", seed=0, time_limit=0.5, num_sweeps=100_000)
    assert solution.stop_reason is StopReason.TIME_LIMIT


def test_beta_range_rises():
    from formulations import to_bqm

    hot, cold = beta_range(to_bqm(layered_problem(5), prices={"bytes": 1e-6}))
    assert 0 < hot < cold


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [
        (dwave.samplers.TabuSampler(), {"num_reads": 2, "timeout": 20}),
        (dwave.samplers.PathIntegralAnnealingSampler(), {"num_reads": 5, "num_sweeps": 50}),
        (dwave.samplers.SteepestDescentSampler(), None),
        (dimod.TruncateComposite(dwave.samplers.SteepestDescentSampler(), 3), {"num_reads": 5}),
    ],
    ids=["tabu", "sqa", "descent", "composite"],
)
def test_any_bqm_sampler_is_a_solver(problem, best, sampler, parameters):
    solution = solve(problem, sampler, seed=0, parameters=parameters, rounds=3)
    assert solution.solver == type(sampler).__name__
    assert solution.objective <= 1.5 * best


def test_a_cqm_sampler_gets_the_constraints_as_they_are():
    problem = layered_problem(4, bits=(2, 4, 8), seed=1)
    solution = solve(problem, dimod.ExactCQMSolver(), seed=0)
    assert solution.objective == pytest.approx(solve(problem, "brute-force").objective)
    assert solution.details["share_valid"] == 1


@pytest.mark.parametrize("thing", [object(), 3, dimod.ExactSolver])
def test_what_is_no_sampler_is_refused(thing):
    with pytest.raises(InvalidOptionError, match="sampler"):
        from_sampler(thing)


def test_parameters_that_the_sampler_lacks_are_refused(problem):
    with pytest.raises(InvalidOptionError, match=r"no parameter chain_strength.*num_reads"):
        solve(problem, dwave.samplers.TabuSampler(), parameters={"chain_strength": 2})


@pytest.mark.parametrize(("option", "value"), [("rounds", 0), ("num_reads", 0), ("encoding", "unary")])
def test_impossible_options_are_refused(problem, option, value):
    with pytest.raises(InvalidOptionError, match=option):
        solve(problem, "sa", **{option: value})
