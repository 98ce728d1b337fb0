"""Presolve changes no answer: optimum, verdict and bound against every choice; what goes, and what must stay."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from formulations import PairTerms, Problem
from formulations.generators.families import signed_pairs
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions import components as components_module
from formulations.reductions import dominance as dominance_module
from formulations.reductions import presolve as reduce_module
from formulations.reductions.dominance import Integers, _PairBound, drop_dominated
from formulations.reductions.presolve import Presolved, reduce_problem
from formulations.reductions.scaling import scaled
from solvers import Status, StopReason, solve
from solvers import run as run_module
from solvers.base import Solver
from solvers.exact.brute_force import BruteForce
from solvers.heuristic.greedy import Greedy


def best_choice(problem: Problem) -> tuple[float | None, tuple[int, ...] | None]:
    """The least objective and the first choice that has it, by looking at all of them."""
    best, first = None, None
    for choice in itertools.product(*(range(len(options)) for options in problem.options)):
        judged = problem.evaluate(choice)
        if judged.feasible and (best is None or judged.objective < best - 1e-12):
            best, first = judged.objective, choice
    return best, first


def beside(*problems: Problem) -> Problem:
    """Problems that have nothing to do with each other, as one."""
    pairs, uses, budgets, begin = [], {}, {}, 0
    size = sum(problem.num_options for problem in problems)
    for i, problem in enumerate(problems):
        end = begin + problem.num_options
        for name, use in problem.resources.items():
            uses[f"{name}-{i}"] = np.concatenate([np.zeros(begin), use, np.zeros(size - end)])
            if name in problem.budgets:
                budgets[f"{name}-{i}"] = problem.budgets[name]
        sparse, factor = problem.pairs.sparse, problem.pairs.factor
        block = np.zeros((problem.num_options,) * 2) if sparse is None else sparse.toarray()
        if factor is not None:
            block += factor @ factor.T
        pairs.append(np.triu(block * (problem.group_of[:, None] != problem.group_of), 1))
        begin = end
    return Problem(
        [f"{name}-{i}" for i, problem in enumerate(problems) for name in problem.groups],
        [options for problem in problems for options in problem.options],
        np.concatenate([problem.cost for problem in problems]),
        uses,
        budgets,
        PairTerms(sparse=scipy.sparse.csr_array(scipy.sparse.block_diag(pairs))),
        sum(problem.offset for problem in problems),
    )


def assert_nothing_is_lost(problem: Problem, reduction: Presolved) -> None:
    """Feasibility, the optimum and the first optimum in lexicographic order survive; a choice is never made worse."""
    best, first = best_choice(problem)
    found = [best_choice(part.problem) for part in reduction.parts]
    if best is None:
        last = not reduction.parts and not problem.evaluate(reduction.lift(reduction.join([]))).feasible
        assert not reduction.feasible or last or any(one is None for one, _ in found)
        return
    assert reduction.feasible
    joined = reduction.join([choice for _, choice in found])
    assert reduction.problem.evaluate(joined).objective == pytest.approx(best, abs=1e-9)
    if found:
        assert reduction.problem.offset + sum(one for one, _ in found) == pytest.approx(best, abs=1e-9)
    assert tuple(reduction.lift(joined)) == first
    rng = np.random.default_rng(problem.num_options)
    for _ in range(5):
        choice = rng.integers(0, np.diff(problem.group_offsets))
        before, after = problem.evaluate(choice), problem.evaluate(reduction.lift(reduction.lower(choice)))
        assert not before.feasible or (after.feasible and after.objective <= before.objective + 1e-9)


def all_decided(problem: Problem) -> list[int]:
    """The choice that presolve alone comes to."""
    reduction = reduce_problem(problem)
    assert not reduction.parts
    return reduction.lift(reduction.join([])).tolist()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), table=st.booleans())
def test_nothing_is_lost(seed, table):
    problem = small_problem(seed, max_groups=5)
    with pytest.MonkeyPatch.context() as patch:
        if not table:  # as where a table of all pairs would take much memory
            patch.setattr(dominance_module._PairBound, "gram", None)
        reduction = reduce_problem(problem)
    assert_nothing_is_lost(problem, reduction)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.integers(1, 3))
def test_nothing_is_lost_between_independent_parts(seed, most):
    problem = beside(*(small_problem(seed + i, max_groups=3, max_options=3) for i in range(3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components_module, "MAX_PARTS", most)
        reduction = reduce_problem(problem)
    assert len(reduction.parts) <= most
    assert_nothing_is_lost(problem, reduction)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_is_lost_by_the_bounds_for_large_problems(seed):
    problem = small_problem(seed, max_groups=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dominance_module, "EXACT_OPTIONS", 0)
        loose = reduce_problem(problem)
    assert_nothing_is_lost(problem, loose)
    if loose.feasible:
        assert reduce_problem(problem).summary()["options"][1] <= loose.summary()["options"][1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_is_lost_where_a_large_factor_is_not_copied(seed):
    problem = small_problem(seed, max_groups=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduce_module, "LARGE_FACTOR", 0)
        patch.setattr(reduce_module, "COPY_PAYS", 1.0)
        reduction = reduce_problem(problem)
    if problem.pairs.rank and reduction.feasible and min(map(len, problem.options)) > 1:
        assert all(part.problem.num_options == problem.num_options for part in reduction.parts)
        assert all(part.problem.pairs.factor is problem.pairs.factor for part in reduction.parts)
    assert_nothing_is_lost(problem, reduction)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), solver=st.sampled_from(["brute-force", "milp", "dp", "auto"]))
def test_exact_solvers_give_the_same_answer_with_and_without(seed, solver):
    problem = beside(*(small_problem(seed + i, max_groups=3, max_options=3) for i in range(2)))
    if problem.pairs and solver == "dp":
        solver = "brute-force"
    alone, found = (solve(problem, solver, seed=0, presolve=presolve) for presolve in (False, True))
    assert found.status is alone.status
    assert found.problem_fingerprint == problem.fingerprint()
    if alone.objective is not None:
        size = 1.0 + np.abs(problem.cost).sum()
        assert found.objective == pytest.approx(alone.objective, rel=1e-9, abs=1e-9 * size)
        assert found.bound == pytest.approx(alone.bound, rel=1e-9, abs=1e-9 * size)
        assert found.usage == problem.evaluate(found.choice).usage


def test_an_option_that_leaves_no_room_for_the_others_goes_again_and_again():
    uses = {"bytes": [9, 5, 4, 6, 3], "macs": [1, 1, 9, 1, 9]}
    problem = Problem(["a", "b"], [["x", "y", "z"], ["x", "y"]], [0, 1, 2, 0, 1], uses, {"bytes": 11, "macs": 17})
    reduction = reduce_problem(problem)  # x takes too many bytes; then z + y too many macs
    assert reduction.stand_in[0] != 0
    assert_nothing_is_lost(problem, reduction)


def test_of_equal_options_the_first_stays():
    reduction = reduce_problem(Problem(["a"], [["x", "y", "z"]], [2.0, 1.0, 1.0], {"bytes": [1, 1, 1]}, {}))
    assert reduction.lift(reduction.join([])).tolist() == [1]
    assert reduction.stand_in.tolist() == [1, 1, 1]


def test_with_pair_terms_an_option_goes_only_when_no_context_could_need_it():
    def problem(gain: float) -> Problem:
        sparse = scipy.sparse.csr_array(([-1.0, -3.0, -3.0], ([1, 0, 1], [2, 3, 3])), shape=(4, 4))
        pairs = PairTerms(sparse=sparse)
        uses = {"bytes": [1, 1, 1, 2]}
        return Problem(["a", "b"], [["x", "y"], ["x", "y"]], [0.0, gain, 0.0, 0.5], uses, {"bytes": 3}, pairs)

    assert all_decided(problem(1.5)) == [0, 1]
    kept = reduce_problem(problem(0.5).derived(cost=np.array([0.0, 0.5, 0.0, 9.0])))
    assert best_choice(kept.original)[1] == (1, 0)
    assert kept.lift(best_choice(kept.problem)[1]).tolist() == [1, 0]


def test_budgets_that_cannot_bind_go_and_whole_uses_lower_the_others():
    uses = {"bytes": [8, 4, 8, 4], "macs": [5, 6, 5, 6]}
    problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], uses, {"bytes": 13.5, "macs": 12})
    reduction = reduce_problem(problem)
    assert reduction.budgets_dropped == ("macs",)
    assert reduction.budgets_lowered == ("bytes",)
    assert dict(reduction.parts[0].problem.budgets) == {"bytes": 12.0}


def test_uses_without_a_common_unit_leave_the_budget():
    uses = {"bytes": [0.3, 0.1, 0.7, 0.2]}
    reduction = reduce_problem(Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 0.95}))
    assert not reduction.changed
    assert reduction.problem is reduction.original


def test_equal_uses_that_meet_the_budget_within_its_tolerance_have_no_unit():
    problem = Problem(["a"], [["x", "y"]], [1, 0], {"bytes": [8, 8]}, {"bytes": 8 / (1 + 0.9e-12)})
    assert solve(problem, "brute-force").objective == 0.0


def test_a_problem_in_which_nothing_can_go_is_not_copied():
    problem = layered_problem(60, seed=3)
    reduction = reduce_problem(problem)
    assert not reduction.changed
    assert reduction.problem is problem
    assert "presolve" not in solve(problem, "greedy").details


def test_a_decided_problem_is_optimal_at_once():
    problem = layered_problem(500, rank=0).with_budgets(bytes=1e12)

    class Never(Greedy):
        def run(self, problem, search):
            raise AssertionError("nothing was left to solve")

    solution = solve(problem, Never)
    assert solution.status is Status.OPTIMAL
    cheapest = problem.cost.reshape(500, 6).argmin(axis=1)
    assert solution.choice.tolist() == cheapest.tolist()
    assert solution.bound == solution.objective
    assert solution.details["presolve"]["options"] == [3000, 0]


def test_clashing_budgets_are_proved_by_presolve_where_one_option_after_the_other_goes():
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    assert not reduce_problem(problem).feasible
    assert solve(problem, "greedy").status is Status.INFEASIBLE
    assert solve(problem, "greedy", presolve=False).status is Status.UNKNOWN


# --- the search of the parts -----------------------------------------------------------------------------------------


def two_parts() -> Problem:
    """Two problems with pair terms and a budget each, of which one option goes."""
    problem = beside(*(layered_problem(4, bits=(2, 4, 8), rank=2, seed=seed) for seed in (1, 2)))
    assert [part.problem.num_options for part in reduce_problem(problem).parts] == [11, 12]
    return problem


def test_parts_are_solved_apart_and_their_bounds_add_up():
    problem = two_parts()
    solution = solve(problem, "auto")
    alone = solve(problem, "brute-force", presolve=False)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(alone.objective, rel=1e-12)
    assert solution.bound == pytest.approx(alone.objective, rel=1e-9)
    assert solution.details["presolve"]["parts"] == 2
    assert [details["plan"] for details in solution.details["parts"]]
    bounds = [point.bound for point in solution.trace if point.bound is not None]
    assert bounds == sorted(bounds)


def test_a_time_limit_cuts_the_parts_and_nothing_is_called_optimal():
    class Slow(Solver):
        name, summary = "slow", "waits for its share of the time"

        def run(self, problem, search):
            shares.append(search.remaining())
            while not search.expired():
                pass

    shares: list[float] = []
    problem = two_parts()
    solution = solve(problem, type("SlowOne", (Slow,), {"option_defaults": classmethod(lambda _: {})}), time_limit=0.2)
    assert solution.status is Status.FEASIBLE  # from the choice every part begins with
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert solution.wall_s < 1.0
    assert shares[0] == pytest.approx(0.1, abs=0.05)
    assert shares[1] == pytest.approx(0.1, abs=0.05)


def test_an_interrupt_between_parts_keeps_what_was_found():
    problem, seen = two_parts(), []

    def interrupt(progress):
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    solution = solve(problem, "auto", on_progress=interrupt)
    assert solution.stop_reason is StopReason.INTERRUPTED
    assert solution.objective == min(one.objective for one in seen if one.objective is not None)


def test_a_start_goes_through_presolve_even_when_its_options_went():
    problem = layered_problem(8, rank=0, bits=(2, 4, 8), seed=1)
    cost = problem.cost.copy()
    cost[2] = 1e3  # 8 bits of the first layer are dominated
    problem = problem.derived(cost=cost)
    start = np.zeros(8, dtype=int)
    start[0] = 2

    class Idle(Greedy):
        def run(self, problem, search):
            seen.append(search.initial)

    seen: list[np.ndarray] = []
    assert problem.evaluate(start).feasible
    solution = solve(problem, Idle, initial=start)
    assert seen[0] is not None
    assert solution.objective < problem.evaluate(start).objective


def test_a_pool_is_lifted():
    class Pooling(BruteForce):
        def run(self, problem, search):
            super().run(problem, search)
            search.pool.append((tuple(search.choice.tolist()), search.unit * search.objective))

    problem = two_parts()
    solution = solve(problem, Pooling)
    assert tuple(solution.choice) in dict(solution.pool)
    for choice, objective in solution.pool:
        assert problem.evaluate(choice).objective == pytest.approx(objective)


def test_prices_are_given_for_budgets_that_went_too():
    problem = layered_problem(20, rank=0)
    loose = Problem(
        problem.groups,
        problem.options,
        problem.cost,
        {**problem.resources, "macs": np.ones(problem.num_options)},
        {**problem.budgets, "macs": 1e9},
    )
    prices = solve(loose, "lagrangian").details["prices"]
    assert prices["macs"] == 0.0
    assert prices["bytes"] > 0.0


def test_scores_of_any_size_give_the_same_reduction():
    problem = layered_problem(30, rank=2, degree=2, seed=4)
    reference = reduce_problem(problem)
    for scale in (1e-12, 1e-6, 3.7, 1e9):
        assert np.array_equal(reduce_problem(scaled(problem, scale).problem).stand_in, reference.stand_in)


@pytest.mark.parametrize("solver", ["auto", "greedy", "milp", "anneal", "sa"])
def test_a_time_that_presolve_uses_up_still_gives_a_choice(solver: str) -> None:
    problem = signed_pairs(3000, 4, 2, seed=1)
    found = solve(problem, solver, time_limit=1e-3, seed=0)
    assert found.choice is not None
    assert problem.evaluate(found.choice).feasible


def test_presolve_makes_no_further_pass_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(reduce_module, "drop_dominated", lambda *given: passes.append(drop_dominated(*given)))
    problem = layered_problem(30, rank=0, seed=1)
    for expired in (lambda: False, lambda: True):
        passes.clear()
        reduction = reduce_problem(problem, expired)
        assert (len(passes) == 1) == expired()
        choices = [solve(part.problem, "milp").choice for part in reduction.parts]
        lifted = reduction.lift(reduction.join(choices))
        assert problem.evaluate(lifted).objective == pytest.approx(solve(problem, "milp").objective)


def test_comparing_options_stops_when_the_time_is_over() -> None:
    problem = layered_problem(30, rank=0, seed=1)
    left: list[int] = []
    for looks in (1, 3, 10_000):
        answers = iter([False] * looks)
        keep, stand_in = np.ones(problem.num_options, dtype=bool), np.arange(problem.num_options)
        drop_dominated(problem, keep, stand_in, list(problem.budgets), lambda answers=answers: next(answers, True))
        left.append(int(keep.sum()))
        assert (stand_in[keep] == np.flatnonzero(keep)).all()
    assert left[0] > left[1] >= left[2]


def test_presolve_gets_a_fifth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def reduce(problem: Problem, expired: Callable[[], bool]) -> Presolved:
        shares.append(expired.__self__.remaining())  # type: ignore[attr-defined]
        return reduce_problem(problem, expired)

    monkeypatch.setattr(run_module, "reduce_problem", reduce)
    for limit in (50.0, None):
        assert solve(layered_problem(5), "greedy", time_limit=limit).feasible
    assert 5.0 < shares[0] <= 10.0
    assert shares[1] == np.inf


def test_few_pairs_of_many_options_with_a_factor_need_the_exact_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, size = np.random.default_rng(1), 300
    uses = {"bytes": rng.random(2 * size)}
    pairs = PairTerms(factor=rng.normal(size=(2 * size, 6)))
    options = [[str(option) for option in range(size)]] * 2
    problem = Problem(["a", "b"], options, rng.normal(size=2 * size), uses, {"bytes": 1.0}, pairs)
    compared = []
    exactly = _PairBound._exactly

    def count(self: _PairBound, better: Integers, worse: Integers) -> NDArray[np.float64]:
        compared.append(len(better))
        return exactly(self, better, worse)

    monkeypatch.setattr(_PairBound, "_exactly", count)
    drop_dominated(problem, np.ones(2 * size, dtype=bool), np.arange(2 * size), ["bytes"])
    assert sum(compared) < 0.05 * size**2  # of at most size² pairs that use no more
