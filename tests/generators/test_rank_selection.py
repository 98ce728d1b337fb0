"""Rank selection: tables as the SVD gives them, problems against every choice, ties undone exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formulations import InfeasibleBudgetError, InvalidProblemError, Problem
from formulations.generators.random_instances import small_problem
from formulations.generators.rank_selection import (
    RankTable,
    allow_up_to,
    rank_selection,
    rank_table,
    smallest_threshold,
)
from formulations.generators.vbmf import vbmf_rank
from formulations.reductions.tie import tie
from solvers import solve
from solvers.baselines import penalty, threshold, uniform


def weight(m, n, seed=0):
    return np.random.default_rng(seed).normal(size=(m, n))


def all_choices(problem):
    return itertools.product(*(range(len(group)) for group in problem.options))


def tables(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        m, n = rng.integers(3, 7, 2)
        values = np.linalg.svd(rng.normal(size=(m, n)) * rng.uniform(0.5, 2), compute_uv=False)
        made.append(rank_table(values, (int(m), int(n)), positions=float(rng.integers(1, 5))))
    return made


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_table_holds_what_truncation_leaves_out_and_takes(m, n, seed):
    matrix = weight(m, n, seed)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    table = rank_table(s, (m, n), positions=3, relative=False)
    assert table.labels[-1] == "dense"
    assert table.error[-1] == 0
    assert (np.diff(table.ranks) > 0).all()
    for rank, error, parameters, macs in zip(
        table.ranks[:-1], table.error, table.resources["parameters"], table.resources["macs"], strict=False
    ):
        kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert error == pytest.approx(np.square(matrix - kept).sum(), abs=1e-9)
        assert parameters == u[:, :rank].size + vh[:rank].size < m * n
        assert macs == 3 * parameters


def test_a_table_of_a_zero_weight_has_no_error():
    assert rank_table(np.zeros(4), (4, 6)).error.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("values", "shape", "ranks", "word"),
    [
        ([1.0], (2, 2), None, "2 singular values"),
        ([1.0, 2.0], (2, 2), None, "descending"),
        ([2.0, 1.0], (2, 2), [3], "3"),
        ([2.0, 1.0], (2, 2), [0], "0"),
        ([2.0, float("nan")], (2, 2), None, "singular"),
    ],
)
def test_wrong_tables_are_refused(values, shape, ranks, word):
    with pytest.raises(InvalidProblemError, match=word):
        rank_table(values, shape, ranks=ranks)


@pytest.mark.parametrize("seed", range(10))
def test_the_largest_error_is_least(seed):
    own = tables(4, seed)
    loose = rank_selection(list("abcd"), own, {})
    smallest = loose.minimum_usage()
    budgets = {name: float(np.ceil(1.4 * use)) for name, use in smallest.items()}
    problem = rank_selection(list("abcd"), own, budgets)
    errors = problem.cost
    best = min(
        (errors[problem.flat(choice)].max() for choice in all_choices(problem) if problem.evaluate(choice).feasible),
        default=None,
    )
    if best is None:
        with pytest.raises(InfeasibleBudgetError):
            rank_selection(list("abcd"), own, budgets, largest=True)
        return
    assert smallest_threshold(problem, errors) == best
    largest = rank_selection(list("abcd"), own, budgets, largest=True)
    assert largest.groups == problem.groups
    solution = solve(largest, "brute-force")
    assert largest.cost[largest.flat(solution.choice)].max() == best
    total = min(
        problem.evaluate(choice).objective
        for choice in all_choices(problem)
        if problem.evaluate(choice).feasible and errors[problem.flat(choice)].max() <= best
    )
    assert solution.objective == pytest.approx(total)


def test_a_group_without_an_allowed_option_is_named():
    problem = Problem(["a", "b"], [["x"], ["y"]], [1, 3], {}, {})
    with pytest.raises(InvalidProblemError, match="'b'"):
        allow_up_to(problem, problem.cost, 2.0)


def test_tables_must_fit_together():
    table = rank_table([1.0, 0.5, 0.2], (3, 3))
    other = RankTable(labels=("dense",), ranks=(3,), error=np.zeros(1), resources={"bytes": np.ones(1)})
    with pytest.raises(InvalidProblemError, match="'b'"):
        rank_selection(["a", "b"], [table, other], {})
    with pytest.raises(InvalidProblemError, match="one table"):
        rank_selection(["a", "b"], [table], {})


@pytest.mark.parametrize("seed", range(40))
def test_tied_groups_choose_alike_at_the_same_objective(seed):
    problem = small_problem(seed)
    by_size = {}
    for name, options in zip(problem.groups, problem.options, strict=True):
        by_size.setdefault(len(options), []).append(name)
    sets = [names for names in by_size.values() if len(names) > 1]
    joined = tie(problem, sets)
    for choice in itertools.islice(all_choices(joined.problem), 60):
        lifted = joined.lift(choice)
        small, whole = joined.problem.evaluate(choice), problem.evaluate(lifted)
        assert small.objective == pytest.approx(whole.objective, abs=1e-9)
        assert small.usage == pytest.approx(whole.usage)
        place = {name: g for g, name in enumerate(problem.groups)}
        assert all(len({int(lifted[place[name]]) for name in names}) == 1 for names in sets)


@pytest.mark.parametrize(
    ("sets", "word"),
    [
        ([["a", "z"]], "'z'"),
        ([["a", "b"], ["b", "c"]], "is in two sets"),
        ([["a", "d"]], "equally many"),
        (["ab"], "string"),
    ],
)
def test_wrong_ties_are_refused(sets, word):
    problem = Problem(list("abcd"), [["x", "y"]] * 3 + [["x"]], [0.0] * 7, {}, {})
    with pytest.raises(InvalidProblemError, match=word):
        tie(problem, sets)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_vbmf_finds_the_rank_under_noise(rank):
    rng = np.random.default_rng(rank)
    matrix = rng.normal(size=(80, rank)) @ rng.normal(size=(rank, 50)) + 0.2 * rng.normal(size=(80, 50))
    for one in (matrix, matrix.T, 1e-6 * matrix):
        assert vbmf_rank(np.linalg.svd(one, compute_uv=False), one.shape) == rank


def test_vbmf_of_noise_and_of_zero_is_no_rank():
    noise = np.random.default_rng(0).normal(size=(100, 60))
    assert vbmf_rank(np.linalg.svd(noise, compute_uv=False), noise.shape) == 0
    assert vbmf_rank(np.zeros(5), (5, 8)) == 0


# --- selectors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(15))
def test_selectors_stay_within_the_budget_and_never_beat_the_optimum(seed):
    problem = rank_selection(list("abcd"), tables(4, seed), {})
    problem = problem.with_budgets(parameters=float(np.ceil(1.3 * problem.minimum_usage()["parameters"])))
    best = solve(problem, "brute-force").objective
    for choice in (uniform(problem, "parameters"), threshold(problem), penalty(problem, "parameters")):
        judged = problem.evaluate(choice)
        assert judged.feasible
        assert judged.objective >= best - 1e-12


def test_the_threshold_is_the_smallest_that_fits():
    problem = rank_selection(list("abc"), tables(3), {})
    problem = problem.with_budgets(parameters=float(np.ceil(1.5 * problem.minimum_usage()["parameters"])))
    chosen = problem.flat(threshold(problem))
    assert problem.cost[chosen].max() == smallest_threshold(problem, problem.cost)


def test_selectors_take_all_when_there_is_room_and_nothing_when_there_is_none():
    problem = rank_selection(list("abc"), tables(3), {"parameters": 1e9})
    full = [len(options) - 1 for options in problem.options]
    for found in (uniform(problem, "parameters"), threshold(problem), penalty(problem, "parameters")):
        assert found.tolist() == full
    none = problem.with_budgets(parameters=1.0)
    assert uniform(none, "parameters") is threshold(none) is penalty(none, "parameters") is None


def test_selectors_refuse_what_is_not_there():
    problem = rank_selection(["a"], tables(1), {})
    with pytest.raises(InvalidProblemError, match="watts"):
        uniform(problem, "watts")
    with pytest.raises(InvalidProblemError, match="one error"):
        threshold(problem, [1.0])
