"""Pair terms of resources: judged as they are defined, kept by files and reductions, solved within the true budgets."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pulp
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, InfeasibleBudgetError, InvalidProblemError, PairTerms, Problem
from formulations.exchange.suffixes import SUFFIXES, read_problem, write_problem
from formulations.feasibility.explain import explain_infeasibility
from formulations.forms.bqm import to_bqm
from formulations.forms.cqm import to_cqm
from formulations.forms.integer_program import to_integer_program
from formulations.forms.nonlinear import to_nonlinear
from formulations.reductions import linearisation
from formulations.reductions.components import split
from formulations.reductions.presolve import reduce_problem
from formulations.reductions.pricing import priced
from formulations.reductions.restriction import restrict
from solvers import Status, StopReason, UnsupportedProblemError, available, solve
from solvers.composites import auto
from solvers.kernels.paired_uses import PAIRS, sampled_partners
from solvers.paired_budgets import UNPROVEN, solve_paired
from solvers.run import as_solver
from solvers.search import Search
from tests.quick import slow_but

SEEDS = st.integers(0, 2**32 - 1)


def paired_problem(seed: int, groups: int = 4, *, rank: int = 2) -> Problem:
    """Layers in a row whose use is the product of two widths, a factor and some sparse terms."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, groups)
    sizes[0] = 3
    starts = np.concatenate([[0], np.cumsum(sizes)])
    group_of, count = np.repeat(np.arange(groups), sizes), int(starts[-1])
    width = np.concatenate([rng.integers(1, 9, size) for size in sizes]).astype(float)
    cost = rng.exponential(1.0, count)
    terms, sparse = scipy.sparse.lil_array((count, count)), scipy.sparse.lil_array((count, count))
    for u, v in itertools.combinations(range(count), 2):
        if group_of[v] - group_of[u] == 1:
            terms[u, v] = width[u] * width[v]
        if group_of[u] != group_of[v] and rng.random() < 0.2:
            sparse[u, v] = rng.normal()
    resources = {"macs": 2.0 * width, "bytes": rng.integers(1, 9, count).astype(float)}
    factor = rng.normal(size=(count, rank)) if rank else None
    names, labels = [f"g{g}" for g in range(groups)], [[f"o{i}" for i in range(size)] for size in sizes]
    pairs = PairTerms(sparse=scipy.sparse.csr_array(sparse), factor=factor)
    problem = Problem(
        names, labels, cost, resources, {}, pairs, 0.5, {"macs": 3.0}, {"macs": scipy.sparse.csr_array(terms)}
    )
    uses = [problem.evaluate(choice).usage["macs"] for choice in every_choice(problem)]
    return Problem(
        names, labels, cost, resources, {"macs": float(np.quantile(uses, 0.3))}, pairs, 0.5, {"macs": 3.0},
        problem.resource_pairs,
    )  # fmt: skip


def every_choice(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(options)) for options in problem.options)))


def best_of(problem: Problem) -> float:
    judged = [problem.evaluate(choice) for choice in every_choice(problem)]
    return min(own.objective for own in judged if own.feasible)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_use_is_what_the_definition_says(seed: int) -> None:
    problem = paired_problem(seed)
    terms = problem.resource_pairs["macs"].toarray()
    choice = [int(np.random.default_rng(seed).integers(len(options))) for options in problem.options]
    chosen = problem.flat(choice)
    expected = 3.0 + problem.resources["macs"][chosen].sum()
    expected += sum(terms[u, v] for u, v in itertools.combinations(chosen, 2))
    assert problem.evaluate(choice).usage["macs"] == pytest.approx(expected, rel=1e-12)
    smallest = min(problem.evaluate(own).usage["macs"] for own in every_choice(problem))
    assert problem.minimum_usage()["macs"] <= smallest * (1 + 1e-12)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_files_and_pickles_keep_the_terms(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    problem = paired_problem(seed)
    file = tmp_path_factory.mktemp("problems") / "problem.npz"
    problem.save(file)
    for again in (Problem.load(file), pickle.loads(pickle.dumps(problem))):
        assert again.fingerprint() == problem.fingerprint()
        assert (again.resource_pairs["macs"] != problem.resource_pairs["macs"]).nnz == 0


def test_a_problem_without_terms_keeps_its_fingerprint_and_file_version(tmp_path: Path) -> None:
    plain = Problem(["a"], [["x", "y"]], [0, 1], {"macs": [2, 1]}, {"macs": 1})
    empty = Problem(
        ["a"],
        [["x", "y"]],
        [0, 1],
        {"macs": [2, 1]},
        {"macs": 1},
        None,
        0.0,
        {},
        {"macs": scipy.sparse.csr_array((2, 2))},
    )
    assert plain.fingerprint() == empty.fingerprint()
    assert empty.paired_budgets == ()


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"bytes": scipy.sparse.csr_array((4, 4))}, "pair terms of 'bytes' name no resource"),
        ({"macs": scipy.sparse.csr_array((3, 3))}, "for 3 options, the problem has 4"),
        ({"macs": scipy.sparse.csr_array(([-1.0], ([0], [2])), shape=(4, 4))}, "must not be negative, found -1"),
        ({"macs": scipy.sparse.csr_array(([1.0], ([0], [1])), shape=(4, 4))}, "two options of one group"),
        ({"macs": scipy.sparse.csr_array(([1.0], ([2], [0])), shape=(4, 4))}, "strictly upper triangular"),
    ],
)
def test_terms_that_are_none_are_refused(terms: dict[str, scipy.sparse.csr_array], said: str) -> None:
    with pytest.raises(InvalidProblemError, match=said):
        Problem(["a", "b"], [["x", "y"]] * 2, [0] * 4, {"macs": [1] * 4}, {"macs": 3}, None, 0.0, {}, terms)


@given(SEEDS, st.floats(0.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_a_priced_problem_bounds_the_stated_one(seed: int, price: float) -> None:
    problem = paired_problem(seed)
    pricing = priced(problem, {"macs": price})
    lowest = min(pricing.problem.evaluate(choice).objective for choice in every_choice(problem))
    assert pricing.lift_bound(lowest) <= best_of(problem) + 1e-9
    choice = every_choice(problem)[seed % len(every_choice(problem))]
    judged = problem.evaluate(choice)
    expected = judged.objective + price * (judged.usage["macs"] - problem.budgets["macs"])
    assert pricing.problem.evaluate(choice).objective == pytest.approx(expected, abs=1e-9)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_restriction_keeps_uses_and_objectives(seed: int) -> None:
    problem = paired_problem(seed)
    rng = np.random.default_rng(seed)
    keep = rng.random(problem.num_options) < 0.6
    keep[problem.group_offsets[:-1]] = True
    part = restrict(problem, keep)
    choice = [int(rng.integers(len(options))) for options in part.problem.options]
    small, large = part.problem.evaluate(choice), problem.evaluate(part.lift(choice))
    assert small.objective == pytest.approx(large.objective, abs=1e-9)
    assert small.usage["macs"] == pytest.approx(large.usage["macs"], rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_brute_force_finds_the_best_choice(seed: int) -> None:
    problem = paired_problem(seed)
    solution = solve(problem, "brute-force")
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(best_of(problem), abs=1e-9)


@pytest.mark.parametrize("solver", ["auto", "milp", "cp-sat", "miqp"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_optimum_or_its_absence_is_proven(solver: str, seed: int) -> None:
    if why := as_solver(solver).why_not():
        pytest.skip(why)
    problem = paired_problem(seed, groups=3)
    solution = solve(problem, solver, seed=0)
    assert (solution.status, solution.stop_reason) == (Status.OPTIMAL, StopReason.COMPLETED)
    assert solution.objective == pytest.approx(best_of(problem), abs=1e-9)
    uses = [problem.evaluate(choice).usage["macs"] for choice in every_choice(problem)]
    bytes_ = [problem.evaluate(choice).usage["bytes"] for choice in every_choice(problem)]
    within = [used for used, size in zip(uses, bytes_, strict=True) if size <= min(bytes_)]
    none = problem.with_budgets(macs=0.5 * (min(uses) + min(within)), bytes=min(bytes_))
    if min(within) > min(uses):
        assert solve(none, solver, seed=0).status is Status.INFEASIBLE


def test_prices_that_end_a_run_before_a_proof_are_named() -> None:
    solution = solve(paired_problem(0), "greedy", seed=0)
    assert (solution.status, solution.details["stopped"]) == (Status.FEASIBLE, UNPROVEN)


def test_a_linear_statement_that_the_time_limit_ends_says_so() -> None:
    problem = paired_problem(0, groups=4)
    search = Search(problem, solver="slow", time_limit=60)
    solve_paired(problem, search, lambda inner: inner.cut_short(), exact=True)
    assert search.solution(StopReason.COMPLETED, {}).stop_reason is StopReason.TIME_LIMIT


def test_auto_proves_what_it_does_not_enumerate_by_a_turn_on_the_linear_statement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "ENUMERABLE", 10)
    for seed in range(4):
        problem = paired_problem(seed, rank=0)
        solution = solve(problem, "auto", seed=0)
        assert (solution.status, solution.stop_reason) == (Status.OPTIMAL, StopReason.COMPLETED)
        assert solution.objective == pytest.approx(best_of(problem), abs=1e-9)


def test_auto_goes_on_by_prices_first_and_says_what_ended_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, taken = paired_problem(0), []
    search = Search(problem, solver="auto", time_limit=60)
    solve_paired(problem, search, lambda inner: taken.append(inner.problem), prove=lambda inner: inner.cut_short())
    assert taken  # prices before the turn
    assert search.cut
    monkeypatch.setattr(auto, "ENUMERABLE", 10)
    monkeypatch.setattr(linearisation, "MAX_NUMBERS", 10)
    solution = solve(problem, "auto", seed=0, time_limit=5)
    assert solution.choice is not None
    assert "linearising" in solution.details["stopped"]


def test_what_is_too_large_to_linearise_is_left_unproven_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearisation, "MAX_NUMBERS", 10)
    solution = solve(paired_problem(0), "milp", seed=0, time_limit=5)
    assert solution.choice is not None
    assert "which leaves the answer unproven: linearising" in solution.details["stopped"]


@pytest.mark.parametrize("solver", ["auto", "anneal", "ga", "greedy", "lagrangian", "sa", "milp"])
@pytest.mark.parametrize("seed", slow_but([0], range(3)))
def test_solvers_stay_within_the_true_budgets_and_their_bounds_hold(solver: str, seed: int) -> None:
    problem = paired_problem(seed)
    solution = solve(problem, solver, seed=0, time_limit=0.5)
    best = best_of(problem)
    assert solution.choice is not None
    judged = problem.evaluate(solution.choice)
    assert judged.feasible
    assert judged.objective == pytest.approx(solution.objective, abs=1e-12)
    assert best - 1e-9 <= judged.objective <= best + 0.3 * abs(best)  # the gap that a price leaves on a few groups
    assert solution.bound is None or solution.bound <= best + 1e-9
    assert solution.status is not Status.OPTIMAL or judged.objective == pytest.approx(best, abs=1e-6)


def test_a_budget_that_binds_nothing_is_proven_without_a_price() -> None:
    problem = paired_problem(1, rank=0)
    loose = problem.with_budgets(macs=1e9)
    free = Problem(loose.groups, loose.options, loose.cost, {}, {}, loose.pairs, loose.offset)
    assert solve(loose, "lagrangian", seed=0).objective == pytest.approx(solve(free, "brute-force").objective, abs=1e-9)


def test_an_impossible_budget_is_refused_with_the_smallest_use() -> None:
    with pytest.raises(InfeasibleBudgetError, match="the smallest possible use is"):
        solve(paired_problem(0).with_budgets(macs=1.0), "anneal")


def test_who_cannot_take_the_terms_says_so_by_name() -> None:
    problem = paired_problem(0)
    with pytest.raises(UnsupportedProblemError, match="the budget for macs has pair terms.*solver 'dp' takes no pair"):
        solve(problem, "dp")
    network = next(info.name for info in available() if info.needs_network and info.available)
    with pytest.raises(UnsupportedProblemError, match=f"solver {network!r} takes no pair terms in a budget"):
        solve(problem, network)


@pytest.mark.parametrize("seed", range(6))
def test_the_integer_program_and_the_constrained_model_hold_the_terms(seed: int) -> None:
    problem = paired_problem(seed)
    model, decode = to_integer_program(problem)
    model.solve(pulp.HiGHS(msg=False))
    judged = problem.evaluate(decode())
    assert judged.feasible
    assert judged.objective == pytest.approx(best_of(problem), abs=1e-6)
    encoded = to_cqm(problem)
    for choice in every_choice(problem)[:40]:
        sample = np.zeros(problem.num_options)
        sample[problem.flat(choice)] = 1
        (state,) = encoded.cqm.iter_constraint_data(dict(enumerate(sample)), labels=["budget macs"])
        assert state.lhs_energy == pytest.approx(problem.evaluate(choice).usage["macs"], rel=1e-9)


def test_forms_without_a_place_for_the_terms_refuse_them(tmp_path: Path) -> None:
    problem = paired_problem(0)
    for refuse in (to_bqm, to_nonlinear, reduce_problem, explain_infeasibility, split):
        with pytest.raises(InvalidProblemError, match="takes no pair terms in a budget"):
            refuse(problem)
    for suffix in set(SUFFIXES) - {".npz"}:
        with pytest.raises(EncodingError, match=r"file.* holds no pair terms in a budget, .*macs; write an \.npz file"):
            write_problem(problem, tmp_path / f"problem{suffix}")
    write_problem(problem, tmp_path / "problem.npz")
    assert read_problem(tmp_path / "problem.npz").fingerprint() == problem.fingerprint()


ROUTES = ("auto", "lagrangian", "greedy", "ga", "beam", "anneal", "sa", "tabu", "milp", "miqp")


@pytest.mark.parametrize("name", ROUTES)
def test_the_only_choice_within_two_budgets_is_found_by_every_solver(name: str) -> None:
    """Prices lead to no choice within both budgets: three of the four are over one of them."""

    def between(values: list[list[float]]) -> scipy.sparse.csr_array:
        return scipy.sparse.csr_array(np.block([[np.zeros((2, 2)), np.array(values)], [np.zeros((2, 4))]]))

    problem = Problem(
        ["a", "b"], [["x", "y"]] * 2, [0, 0, 0, 0], {"first": [3, 7, 4, 9], "second": [6, 3, 8, 0]},
        {"first": 13, "second": 15},
        resource_pairs={"first": between([[2, 1], [4, 8]]), "second": between([[7, 9], [0, 7]])},
    )  # fmt: skip
    within = [choice for choice in itertools.product(range(2), repeat=2) if problem.evaluate(choice).feasible]
    assert within == [(0, 1)]
    found = solve(problem, name, seed=0, time_limit=5)
    assert found.choice is not None
    assert tuple(found.choice) == within[0]


@pytest.mark.parametrize("sizes", [[2] * 50, [40] * 50, [2000] * 2, [1300] * 12, [5000]])
def test_a_pass_of_the_descent_evaluates_a_bounded_number_of_pairs(sizes: list[int]) -> None:
    """Between two passes the clock is checked; all partners have their turn."""
    groups, seen = len(sizes), set()
    for number in range(10_000):
        first_group, step, first_option, thin = sampled_partners(sum(sizes), groups, number)
        partners = range(first_group, groups, step)
        pairs = sum(sizes) * sum(len(range(first_option, sizes[partner], thin)) for partner in partners)
        assert pairs <= max(4 * PAIRS, sum(sizes) * len(partners))
        seen |= {(partner, option) for partner in partners for option in range(first_option, sizes[partner], thin)}
        if len(seen) == sum(sizes):
            break
    assert len(seen) == sum(sizes)
