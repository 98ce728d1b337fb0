"""Annealing inside the choice space, repair and polish, against brute force."""

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import InfeasibleBudgetError, PairTerms, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import InvalidOptionError, Status, StopReason, run
from solvers.kernels.local_search import polish
from solvers.kernels.moves import begin, cross, delta, fits, objective, switch, to_arrays
from solvers.kernels.repair import repair
from tests.quick import slow_but

SEEDS = st.integers(0, 100_000)

solve = partial(run.solve, presolve=False)  # the back end itself is tested


def all_choices(problem):
    return itertools.product(*map(range, np.diff(problem.group_offsets)))


def best_objective(problem):
    """The least objective of any feasible choice, or None."""
    evaluations = map(problem.evaluate, all_choices(problem))
    return min((one.objective for one in evaluations if one.feasible), default=None)


def any_choice(problem, seed):
    return np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets))


def scaled(problem, factor):
    """The same problem with all objective numbers multiplied."""
    sparse, rows = problem.pairs.sparse, problem.pairs.factor
    pairs = PairTerms(None if sparse is None else sparse * factor, None if rows is None else rows * factor**0.5)
    fields = (problem.groups, problem.options, problem.cost * factor, problem.resources, problem.budgets)
    return Problem(*fields, pairs, problem.offset * factor)


@settings(max_examples=100, deadline=None)
@given(SEEDS)
def test_a_move_adds_to_the_objective_what_evaluate_says(seed):
    problem = small_problem(seed)
    arrays, chosen = to_arrays(problem), problem.flat(any_choice(problem, seed))
    total, field, usage = begin(arrays, chosen)
    first, *others = np.random.default_rng(seed).permutation(problem.num_options)
    second = next((v for v in others if problem.group_of[v] != problem.group_of[first]), first)
    old1, old2 = chosen[problem.group_of[first]], chosen[problem.group_of[second]]
    change = delta(arrays, total, field, old1, first)
    if second != first:
        change += delta(arrays, total, field, old2, second) + cross(arrays, old1, first, old2, second)
    before = problem.evaluate(chosen - problem.group_offsets[:-1])
    switch(arrays, chosen, total, field, usage, first)
    switch(arrays, chosen, total, field, usage, second)
    after = problem.evaluate(chosen - problem.group_offsets[:-1])
    assert after.objective - before.objective == pytest.approx(change, abs=1e-9)
    assert objective(arrays, chosen, field) + problem.offset == pytest.approx(after.objective, abs=1e-9)
    assert list(usage) == pytest.approx([after.usage[name] - problem.fixed.get(name, 0.0) for name in problem.budgets])
    assert fits(arrays, usage) == after.feasible


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_repair_finds_a_feasible_choice_whenever_one_exists(seed):
    problem = small_problem(seed)
    repaired = repair(problem, any_choice(problem, seed))
    if repaired is None:
        assert best_objective(problem) is None
    else:
        assert problem.evaluate(repaired).feasible


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_repair_leaves_a_feasible_choice_alone(seed):
    problem = small_problem(seed)
    choice = any_choice(problem, seed)
    if problem.evaluate(choice).feasible:
        assert repair(problem, choice).tolist() == choice.tolist()


def test_repair_takes_the_cheapest_switch_per_unit_of_excess():
    problem = Problem(
        ["a", "b"], [["big", "small"], ["big", "small"]], [0, 5, 0, 4], {"bytes": [10, 0, 10, 0]}, {"bytes": 12}
    )
    assert repair(problem, [0, 0]).tolist() == [0, 1]


def test_repair_of_ten_thousand_groups_ends_just_within_the_budget():
    problem = layered_problem(10_000)
    usage = problem.evaluate(repair(problem, np.full(10_000, 5))).usage["bytes"]
    assert 0.999 * problem.budgets["bytes"] < usage <= problem.budgets["bytes"]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_no_pair_of_switches_improves_a_polished_choice(seed):
    problem = small_problem(seed, max_groups=5)
    start = repair(problem, any_choice(problem, seed))
    if start is None:
        return
    polished = polish(problem, start)
    value = problem.evaluate(polished)
    assert value.feasible
    assert value.objective <= problem.evaluate(start).objective + 1e-12
    for other in all_choices(problem):
        if np.sum(polished != other) <= 2 and (evaluation := problem.evaluate(other)).feasible:
            assert evaluation.objective >= value.objective - 1e-9


def test_polish_refuses_a_choice_over_budget():
    problem = layered_problem(5)
    with pytest.raises(ValueError, match="repair"):
        polish(problem, np.full(5, 5))


@pytest.mark.parametrize("block", slow_but([0, 1], range(4)))
def test_anneal_reaches_the_optimum_of_small_problems(block):
    for seed in range(25 * block, 25 * (block + 1)):
        problem = small_problem(seed)
        best = best_objective(problem)
        try:
            solution = solve(problem, "anneal", seed=seed, sweeps=200)
        except InfeasibleBudgetError:
            assert best is None
            continue
        if best is None:
            assert solution.status is Status.UNKNOWN
        else:
            assert solution.status is Status.FEASIBLE
            assert solution.objective == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("budgeted", [True, False])
def test_same_seed_same_choice_whatever_the_scale(budgeted):
    problem = layered_problem(30, seed=3)
    if not budgeted:
        problem = problem.with_budgets(bytes=1e18)
    choices = [solve(scaled(problem, size), "anneal", seed=5, sweeps=300).choice for size in (1, 1e-12, 1e-3, 1e9)]
    assert all((choice == choices[0]).all() for choice in choices)


def test_anneal_beats_polished_repair():
    problem = layered_problem(100, seed=2)
    polished = polish(problem, repair(problem, np.full(100, 5)))
    assert solve(problem, "anneal", seed=0, sweeps=500).objective < problem.evaluate(polished).objective


def test_anneal_stops_at_the_time_limit_with_a_feasible_choice():
    solution = solve(layered_problem(2000), "anneal", seed=0, time_limit=0.5)
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert solution.feasible


def test_an_interrupt_keeps_the_best_so_far():
    seen = []

    def interrupt(progress):
        seen.append(progress.objective)
        if len(seen) == 3:
            raise KeyboardInterrupt

    solution = solve(layered_problem(100), "anneal", seed=0, on_progress=interrupt)
    assert solution.stop_reason is StopReason.INTERRUPTED
    assert solution.objective == min(seen)


def test_a_given_start_is_never_made_worse():
    problem = layered_problem(60, seed=4)
    first = solve(problem, "anneal", seed=0, sweeps=500)
    again = solve(problem, "anneal", seed=1, sweeps=5, generations=0, initial=first.choice)
    assert again.objective <= first.objective


@pytest.mark.parametrize(("option", "value"), [("sweeps", 0), ("population", 0), ("generations", -1)])
def test_impossible_options_are_refused(option, value):
    with pytest.raises(InvalidOptionError, match=option):
        solve(layered_problem(3), "anneal", **{option: value})


def test_repair_gives_up_when_the_time_is_over_and_not_before(monkeypatch):
    rng = np.random.default_rng(1)
    use = {name: rng.integers(0, 100, 240) * 1.0 for name in "abcde"}
    budgets = {name: numbers.reshape(60, 4).min(axis=1).sum() + 300.0 for name, numbers in use.items()}
    problem = Problem([f"g{i}" for i in range(60)], [list("wxyz")] * 60, [0.0] * 240, use, budgets)
    looks = []
    monkeypatch.setattr("solvers.kernels.repair.GRACE_S", -1.0)
    assert repair(problem, [0] * 60, lambda: bool(looks.append(0))) is None
    every = len(looks)
    looks.clear()
    assert repair(problem, [0] * 60, lambda: looks.append(0) or True) is None
    assert len(looks) <= 2 < every  # once in each of the last two steps
