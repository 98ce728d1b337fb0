"""Numbers of very different sizes: a cost of 1e12 that forbids an option must not hide costs of about 1."""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from formulations import PairTerms, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.cut_off import cut_off
from solvers import Solution, SolverUnavailableError, Status, UnsupportedProblemError, solve
from solvers.composites.auto import FORBIDDING, Auto
from solvers.registry import solver_class
from solvers.search import Search
from solvers.uneven import first_choice, uneven

EXACT = ("brute-force", "dp", "milp", "cp-sat", "miqp", "semidefinite", "lagrangian", "auto")
Exactly = tuple[Fraction, Fraction, tuple[int, ...]]
"""An objective, the sum of its absolute costs and of its pair terms, and its choice."""


def every_choice(problem: Problem) -> Iterator[Exactly]:
    """All feasible choices, with objectives in exact numbers."""
    cost = [Fraction(value) for value in problem.cost.tolist()]
    pairs = np.zeros((problem.num_options,) * 2) if problem.pairs.sparse is None else problem.pairs.sparse.toarray()
    for choice in itertools.product(*(range(len(options)) for options in problem.options)):
        if problem.evaluate(choice).feasible:
            flat = problem.flat(choice).tolist()
            linear = [cost[v] for v in flat]
            paired = [Fraction(pairs[u, v]) for u, v in itertools.combinations(flat, 2)]
            value = Fraction(problem.offset) + sum(linear) + sum(paired)
            yield value, sum(map(abs, linear), abs(sum(paired, Fraction(0)))), choice


def assert_true(problem: Problem, solution: Solution, choices: list[Exactly]) -> None:
    """What the solution says of optimum and bound holds in exact numbers, to 1e-9 of the terms of both choices."""
    if not choices:
        assert solution.status in (Status.INFEASIBLE, Status.UNKNOWN)  # prices of paired budgets do not always prove it
        return
    assert solution.status is not Status.INFEASIBLE
    best, terms, _ = min(choices)
    size = terms
    if solution.choice is not None:
        own, own_terms, _ = next(c for c in choices if c[2] == tuple(solution.choice.tolist()))
        size = max(size, own_terms)
        assert solution.status is not Status.OPTIMAL or own - best <= size / 10**9, (float(own), float(best))
    assert solution.bound is None or Fraction(solution.bound) - best <= size / 10**9, (solution.bound, float(best))


@st.composite
def uneven_problems(draw: st.DrawFn, *, pairs: bool = True) -> Problem:
    """Small numbers among huge ones, in costs and pair terms, under budgets of which some have pair terms."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    huge, share = 10.0 ** draw(st.integers(9, 15)), draw(st.sampled_from([0.2, 0.5]))
    sizes = rng.integers(1, 5, draw(st.integers(2, 5)))
    group_of, options = np.repeat(np.arange(len(sizes)), sizes), int(sizes.sum())
    close = draw(st.booleans())
    signs = [1.0, 1.0, 1.0, -1.0] if draw(st.booleans()) else [1.0]

    def numbers(count: int, share: float) -> np.ndarray:
        small = rng.integers(-5, 6, count) + (3e-7 if close else 1.0) * rng.normal(size=count)
        return np.where(rng.random(count) < share, huge * rng.choice(signs, count), small)

    apart = np.triu(group_of[:, None] != group_of[None, :]) * (rng.random((options, options)) < 0.4)
    cost = numbers(options, share)
    if draw(st.booleans()):
        needed = group_of == rng.integers(len(sizes))
        cost[needed] = huge + cost[needed]
    terms = (
        apart * numbers(options * options, 0.1).reshape(apart.shape) if pairs and draw(st.booleans()) else 0.0 * apart
    )
    uses, budgets, paired = {}, {}, {}
    for name in ("bytes", "macs")[: draw(st.integers(0, 2))]:
        use = rng.integers(1, 20, options).astype(float)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        low, high = np.minimum.reduceat(use, starts).sum(), np.maximum.reduceat(use, starts).sum()
        uses[name], budgets[name] = use, float(np.floor(low + rng.random() * (high - low)))
        if pairs and draw(st.booleans()):
            paired[name] = scipy.sparse.csr_array(apart * rng.integers(0, 9, apart.shape).astype(float))
            budgets[name] += 8.0
    names = [f"g{group}" for group in range(len(sizes))]
    labels = [[f"o{option}" for option in range(size)] for size in sizes]
    pair_terms = PairTerms(sparse=scipy.sparse.csr_array(terms))
    problem = Problem(names, labels, cost, uses, budgets, pair_terms, 0.0, {}, paired)
    assume(all(use <= budgets[name] for name, use in problem.minimum_usage().items()))  # else it is refused
    return problem


@settings(max_examples=20, deadline=None)
@given(problem=uneven_problems(), presolve=st.booleans())
def test_what_auto_and_brute_force_prove_is_true_whatever_the_sizes_of_the_numbers(problem, presolve):
    choices = list(every_choice(problem))
    for solver in ("brute-force", "auto"):
        assert_true(problem, solve(problem, solver, seed=0, time_limit=5.0, presolve=presolve), choices)


@settings(max_examples=60, deadline=None)
@given(problem=uneven_problems(pairs=False), presolve=st.booleans())
def test_what_dynamic_programming_proves_is_true_whatever_the_sizes_of_the_numbers(problem, presolve):
    choices = list(every_choice(problem))
    for solver in ("dp", "lagrangian"):
        assert_true(problem, solve(problem, solver, seed=0, time_limit=5.0, presolve=presolve), choices)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
@settings(max_examples=100, deadline=None)
@given(problem=uneven_problems(), presolve=st.booleans())
def test_what_is_proven_is_true_whatever_the_sizes_of_the_numbers(solver, problem, presolve):
    try:
        solution = solve(problem, solver, seed=0, time_limit=5.0, presolve=presolve)
    except (UnsupportedProblemError, SolverUnavailableError):
        return
    assert_true(problem, solution, list(every_choice(problem)))


@settings(max_examples=100, deadline=None)
@given(problem=uneven_problems())
def test_what_is_cut_off_is_in_no_better_choice(problem):
    choices = list(every_choice(problem))
    for known, _, choice in choices[:: 1 + len(choices) // 5]:
        part = cut_off(problem, choice)
        values = {c: value for value, _, c in choices}
        left = {tuple(part.lift(c).tolist()): part.problem.evaluate(c) for c in
                itertools.product(*(range(len(options)) for options in part.problem.options))}  # fmt: skip
        assert choice in left
        for c, value in values.items():
            assert c in left or value > known
            if c in left and value <= known:
                assert left[c].feasible
                assert left[c].objective == pytest.approx(float(value), abs=1e-9 * np.abs(problem.cost).max())
            elif c in left:
                assert left[c].objective >= known - Fraction(np.abs(problem.cost).max()) / 10**9


def forbidding(huge: float) -> Problem:
    """Four groups in which costs of ``huge`` forbid five options; the best choice has an objective of 2."""
    cost = [4, 0, 0, 2, 4, huge, huge, -1, huge, 2, -1, huge]
    use = {"bytes": [3, 10, 14, 9, 3, 8, 17, 2, 13, 18, 12, 6]}
    return Problem(list("abcd"), [["x", "y", "z"]] * 4, cost, use, {"bytes": 30})


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("huge", [1e6, 1e9, 1e12, 1e15, 1e100, 1e300])
def test_costs_that_forbid_options_may_have_any_size(solver, huge):
    if why := solver_class(solver).why_not():
        pytest.skip(why)
    for presolve in (True, False):
        solution = solve(forbidding(huge), solver, seed=0, presolve=presolve)
        assert (solution.status, solution.objective, solution.bound) == (Status.OPTIMAL, 2.0, 2.0)
        assert solution.choice.tolist() == [1, 1, 1, 1]


def test_pair_terms_that_forbid_two_options_together_may_have_any_size():
    terms = scipy.sparse.csr_array(([1e15, 1e15, 0.5], ([0, 0, 1], [2, 4, 2])), shape=(6, 6))
    problem = Problem(list("abc"), [["x", "y"]] * 3, [0, 1, 0, 3, 0, 3], {}, {}, PairTerms(sparse=terms))
    solution = solve(problem, "brute-force", presolve=False)
    assert (solution.status, solution.objective, solution.choice.tolist()) == (Status.OPTIMAL, 1.5, [1, 0, 0])
    assert cut_off(problem, [1, 1, 0]).problem.pairs.sparse.data.max() <= 10.0


def test_a_bound_is_lowered_where_floats_cannot_tell():
    """The huge gain of "y" cannot be had, which only the search proves, and its rounding hides costs of about 1."""
    terms = scipy.sparse.csr_array(np.triu(np.full((9, 9), 8.0), 1) * np.kron(1 - np.eye(3), np.ones((3, 3))))
    keep = np.tile([1.0, 0.0, 1.0], 3)
    pairs = {"macs": scipy.sparse.csr_array(terms.toarray() * (1 - np.outer(keep, keep)))}
    cost = [1, -1e15, 2, 1, -1e15, 2, 1, -1e15, 2]
    problem = Problem(
        list("abc"), [["x", "y", "z"]] * 3, cost, {"macs": [0] * 9}, {"macs": 5}, None, 0.0, {}, pairs
    )  # fmt: skip
    solution = solve(problem, "brute-force")
    assert solution.objective == 3.0
    assert solution.status is Status.FEASIBLE
    assert -10.0 < solution.bound < 3.0
    assert all(point.bound is None or point.bound < 3.0 for point in solution.trace)
    assert "rounding errors" in solution.details["stopped"]


def test_ordinary_problems_are_not_uneven():
    for seed in range(100):
        assert not uneven(small_problem(seed))
    assert not uneven(layered_problem(200))
    assert "cut_off" not in solve(layered_problem(20), "lagrangian").details


def test_the_first_choice_avoids_huge_costs_where_it_can():
    assert first_choice(forbidding(1e12), 10.0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("solver", [name for name in EXACT if solver_class(name).native_pairs])
@pytest.mark.parametrize("presolve", [True, False])
def test_a_long_row_of_the_factor_hides_no_better_choice(solver: str, presolve: bool) -> None:
    rows = np.zeros((7, 2))
    rows[0, 0], rows[1:, 1] = 1e8, [0.3, -0.4, 0.5, -0.45, 0.7, -0.6]
    problem = Problem(list("abcd"), [["x"], *([["x", "y"]] * 3)], [0.0] * 7, {}, {}, PairTerms(factor=rows))
    found = solve(problem, solver, presolve=presolve, time_limit=5, seed=0, initial=[0, 0, 0, 0])
    assert found.bound is None or found.bound <= -0.415 + 1e-9
    assert found.objective == pytest.approx(-0.415) or found.status is not Status.OPTIMAL


@pytest.mark.parametrize("solver", [*EXACT, "anneal", "ga", "beam"])
def test_pair_terms_in_a_budget_beside_costs_of_1e300_give_an_answer_without_a_warning(solver: str) -> None:
    terms = scipy.sparse.csr_array(([6e5], ([0], [2])), shape=(3, 3))
    uses = {"r": [0.5, 0.3, 0.3], "m": [1024, 268435456, 2097152]}
    problem = Problem(
        ["a", "b"], [["x"], ["y", "z"]], [-1.6, 1e15, 1e300], uses, {"r": 5, "m": 8032002.7}, None, 0, {}, {"m": terms}
    )
    try:
        found = solve(problem, solver, time_limit=1, seed=0)
    except (UnsupportedProblemError, SolverUnavailableError):
        return
    assert found.choice.tolist() == [0, 1]
    assert found.bound is None or found.bound <= found.objective


def test_auto_looks_for_a_choice_without_forbidding_costs_before_it_looks_for_a_bound() -> None:
    rng = np.random.default_rng(133)
    groups, count = np.repeat(np.arange(60), 4), 240
    row, column = np.sort(rng.integers(0, count, (2, 6000)), axis=0)
    apart = groups[row] != groups[column]
    terms = scipy.sparse.coo_array((rng.normal(size=apart.sum()), (row[apart], column[apart])), shape=(count, count))
    cost = np.where(rng.random(count) < 0.1, 1e12, rng.random(count))
    uses = {name: rng.integers(0, 100, count) * 1.0 for name in "ab"}
    budgets = {name: 2.0 * use.reshape(60, 4).min(axis=1).sum() for name, use in uses.items()}
    problem = Problem([f"g{i}" for i in range(60)], [list("wxyz")] * 60, cost, uses, budgets, PairTerms(sparse=terms))
    for stated, second in ((problem, f"anneal: {FORBIDDING}"), (problem.derived(cost=np.minimum(cost, 1.0)), None)):
        search = Search(stated, solver="auto", time_limit=1, seed=0)
        Auto().run(stated, search)
        assert second is None or search.details["plan"][1] == second
        assert second is not None or not any(FORBIDDING in reason for reason in search.details["plan"])
        assert search.objective < 1e9
