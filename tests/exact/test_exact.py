"""Exact back ends against every choice, and what a proof may and may not be called."""

import itertools
from functools import partial

import highspy
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import PairTerms, Problem
from formulations.generators.families import dense_pairs
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled
from solvers import Solution, SolverUnavailableError, Status, StopReason, UnsupportedProblemError, run
from solvers.errors import InvalidOptionError
from solvers.exact.brute_force import MAX_CHOICES
from solvers.search import num_choices
from tests.quick import slow_but

solve = partial(run.solve, presolve=False)  # the back ends themselves are tested


def every_choice(problem: Problem) -> tuple[float | None, tuple[int, ...] | None]:
    """The least objective and the first choice that has it, by looking at all of them."""
    best, best_choice = None, None
    for choice in itertools.product(*(range(len(options)) for options in problem.options)):
        judged = problem.evaluate(choice)
        if judged.feasible and (best is None or judged.objective < best - 1e-12):
            best, best_choice = judged.objective, choice
    return best, best_choice


def assert_same_answer(found: Solution, oracle: Solution, label: object) -> None:
    assert found.status is oracle.status, label
    if oracle.objective is not None:
        assert found.objective == pytest.approx(oracle.objective, rel=1e-9, abs=1e-9), label
        assert found.feasible, label
        assert found.bound == pytest.approx(oracle.objective, rel=1e-7, abs=1e-8), label


@pytest.mark.parametrize("chunk", range(4))
def test_brute_force_finds_the_first_best_choice(chunk):
    for seed in range(30 * chunk, 30 * (chunk + 1)):
        problem = small_problem(seed, max_groups=5)
        objective, choice = every_choice(problem)
        found = solve(problem, "brute-force")
        if choice is None:
            assert found.status is Status.INFEASIBLE
            assert found.choice is None
        else:
            assert found.status is Status.OPTIMAL, seed
            assert found.objective == pytest.approx(objective, rel=1e-12, abs=1e-12), seed
            assert tuple(found.choice) == choice, seed


def test_brute_force_takes_the_first_of_equal_choices_however_the_costs_are_scaled():
    third = 1.0 / 3.0
    problem = Problem(["a", "b"], [["x", "y", "z"]] * 2, [1.0, 2 * third, 0, 0, third, 1.0], {}, {})
    tied = problem.derived(cost=np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1]))
    for scale in (1.0, 1e-12, 3.7, 1e9):
        assert solve(scaled(tied, scale).problem, "brute-force").choice.tolist() == [0, 2]


def test_brute_force_refuses_what_it_cannot_finish():
    problem = layered_problem(40)
    assert num_choices(problem) > MAX_CHOICES
    with pytest.raises(UnsupportedProblemError, match=r"1e\+09 choices"):
        solve(problem, "brute-force")


def agree_with_brute_force(solver: str, seeds: range, **options: object) -> None:
    for seed in seeds:
        problem = small_problem(seed)
        if problem.pairs and solver == "dp":
            continue
        assert_same_answer(solve(problem, solver, seed=0, **options), solve(problem, "brute-force"), seed)


@pytest.mark.parametrize("chunk", slow_but([0, 1], range(4)))
def test_dp_equals_brute_force(chunk):
    agree_with_brute_force("dp", range(500 * chunk, 500 * (chunk + 1)))


def test_milp_equals_brute_force():
    agree_with_brute_force("milp", range(50))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(1, 40))
def test_milp_equals_brute_force_on_many(chunk):
    agree_with_brute_force("milp", range(50 * chunk, 50 * (chunk + 1)))


def test_cbc_equals_brute_force():
    agree_with_brute_force("milp", range(40), backend="cbc")


def test_miqp_equals_brute_force():
    agree_with_brute_force("miqp", range(40))


def test_auto_equals_brute_force():
    agree_with_brute_force("auto", range(200))


@pytest.mark.parametrize("seed", range(4))
def test_dp_and_milp_agree_beyond_what_can_be_enumerated(seed):
    problem = layered_problem(60, rank=0, seed=seed, budget=(0.1, 0.3, 0.6, 0.9)[seed])
    found = [solve(problem, name) for name in ("dp", "milp", "lagrangian", "auto")]
    assert [str(solution.status) for solution in found] == ["OPTIMAL"] * 4
    assert max(s.objective for s in found) - min(s.objective for s in found) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_two_budgets_that_both_bind_are_solved_exactly(seed):
    rng = np.random.default_rng(seed)
    groups, options = 25, 4
    cost = np.sort(rng.random((groups, options)), axis=1).ravel()
    first, second = rng.integers(1, 100, (2, groups * options)).astype(float)
    first = np.sort(first.reshape(groups, options), axis=1)[:, ::-1].ravel()
    budgets = {"bytes": float(first.sum() * 0.2), "macs": float(second.sum() * 0.22)}
    names = [f"g{g}" for g in range(groups)]
    problem = Problem(names, [list("abcd")] * groups, cost, {"bytes": first, "macs": second}, budgets)
    dp, milp = solve(problem, "dp"), solve(problem, "milp")
    assert dp.status is milp.status is Status.OPTIMAL
    assert dp.objective == pytest.approx(milp.objective, rel=1e-9)


@pytest.mark.parametrize("solver", ["dp", "milp", "miqp", "lagrangian"])
def test_budgets_hold_to_the_byte(solver):
    """Sizes near 1e9 bytes: one byte is far below a MIP solver's tolerance, and still decides."""
    size = [1_000_000_001.0, 1.0, 2_000_000_003.0, 2.0, 999_999_937.0, 3.0]
    cost = [0.0, 1.0, 0.0, 1.5, 0.0, 1.0]
    exact = size[2] + size[0] + size[5]  # all but the last group whole
    problem = Problem(["a", "b", "c"], [["keep", "prune"]] * 3, cost, {"bytes": size}, {"bytes": exact})
    assert solve(problem, solver).objective == 1.0
    one_less = problem.with_budgets(bytes=exact - 1)
    oracle = solve(one_less, "brute-force")
    found = solve(one_less, solver)
    assert found.objective == oracle.objective
    assert found.usage["bytes"] <= exact - 1


@pytest.mark.parametrize("solver", ["milp", "miqp", "dp", "auto"])
def test_scores_of_very_different_sizes_all_count(solver):
    """The least score is 1e-11 of the largest, below every absolute tolerance, and free to be chosen well."""
    cost = [0.0, 1.0, 3e-11, 1e-11, 2e-6, 1e-6, 5e-9, 7e-9]
    use = [5.0, 1.0] + [1.0] * 6
    problem = Problem(list("abcd"), [["x", "y"]] * 4, cost, {"bytes": use}, {"bytes": 8.0})
    assert solve(problem, solver).choice.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("seeds", slow_but([range(8)], [range(8), range(8, 50)]), ids=["few", "many"])
@pytest.mark.parametrize("solver", ["brute-force", "dp", "milp", "lagrangian", "auto", "greedy"])
def test_scaling_all_scores_changes_no_choice(solver, seeds):
    for seed in seeds:
        problem = small_problem(seed)
        if problem.pairs and solver == "dp":
            continue
        plain = solve(problem, solver, seed=0)
        for factor in (1e-12, 1e-6, 1e9):
            other = solve(scaled(problem, factor).problem, solver, seed=0)
            assert other.status is plain.status, (seed, factor)
            assert (other.choice is None) == (plain.choice is None)
            if plain.choice is not None:
                assert other.choice.tolist() == plain.choice.tolist(), (seed, factor)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_a_search_cut_by_time_is_not_called_optimal(backend):
    problem = layered_problem(60, seed=3)
    found = solve(problem, "milp", time_limit=1.0, backend=backend)
    assert found.feasible
    assert found.status is Status.FEASIBLE
    assert found.bound < found.objective
    assert found.wall_s < 2.1


@pytest.mark.parametrize("seed", [9037, 11644, 19112, 19813])  # what is decided before leaves the model a constant
def test_milp_bounds_hold_at_every_moment_of_the_run(seed):
    problem = small_problem(seed)
    solution = run.solve(problem, "milp", seed=0)
    assert solution.status is Status.OPTIMAL
    bounds = [point.bound for point in solution.trace if point.bound is not None]
    assert max(bounds) <= solution.objective + 1e-9
    assert solution.objective == pytest.approx(run.solve(problem, "brute-force").objective)


def test_an_interrupted_milp_keeps_what_it_has_and_prints_nothing(monkeypatch, capfd):
    problem, wait, heard = layered_problem(30, rank=0, degree=8, seed=0), highspy.Highs.wait, []

    def pressed(highs, timeout):
        heard.append(timeout)
        if len(heard) == 1:
            raise KeyboardInterrupt
        return wait(highs, timeout)

    monkeypatch.setattr(highspy.Highs, "wait", pressed)
    monkeypatch.setattr("solvers.heuristic.lagrangian.MAX_OPTIONS", 0)  # its bound would leave nothing to HiGHS
    solution = solve(problem, "milp")
    assert solution.stop_reason == "INTERRUPTED"
    assert solution.feasible
    assert len(heard) > 1
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_miqp_prints_nothing(capfd):
    """Whole numbers up to ±1000 in sparse blocks: SCIP doubts some of its linear programs and solves them again."""
    rng = np.random.default_rng(0)
    first, second = np.sort(rng.integers(0, 80, (2, 480)), axis=0)
    weights = rng.integers(-1000, 1001, 480).astype(float)
    apart = first // 4 != second // 4
    terms = scipy.sparse.csr_array((weights[apart], (first[apart], second[apart])), shape=(80, 80))
    use = rng.integers(1, 100, 80).astype(float)
    names = [f"g{group}" for group in range(20)]
    problem = Problem(names, [list("wxyz")] * 20, np.zeros(80), {"b": use}, {"b": 900.0}, PairTerms(sparse=terms))
    assert solve(problem, "miqp", seed=0, time_limit=12.0).feasible
    assert "".join(capfd.readouterr()) == ""


def test_miqp_bends_no_budget():
    """Uses that SCIP's tolerance cannot tell apart, with pair terms: the judge decides, and a cut follows."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        use = 1e9 + rng.integers(0, 4, 12).astype(float)
        factor = rng.normal(size=(12, 2))
        names = [f"g{g}" for g in range(4)]
        budget = float(use.reshape(4, 3).min(axis=1).sum() + 1)
        problem = Problem(
            names, [list("xyz")] * 4, rng.random(12), {"bytes": use}, {"bytes": budget}, PairTerms(factor=factor)
        )
        assert_same_answer(solve(problem, "miqp"), solve(problem, "brute-force"), seed)


def test_budgets_that_clash_are_proved_infeasible():
    use = {"bytes": [8.0, 4.0], "macs": [1.0, 9.0]}
    problem = Problem(["a"], [["keep", "prune"]], [0, 1], use, {"bytes": 5.0, "macs": 5.0})
    for solver in ("brute-force", "dp", "milp", "auto"):
        found = solve(problem, solver)
        assert found.status is Status.INFEASIBLE, solver
        assert found.choice is None


def test_milp_names_the_back_ends_it_knows():
    with pytest.raises(InvalidOptionError, match="must be one of highs, cbc, found 'gurobi'"):
        solve(layered_problem(3), "milp", backend="gurobi")


def test_milp_refuses_more_products_than_it_can_linearise():
    with pytest.raises(UnsupportedProblemError, match="products of options"):
        solve(layered_problem(300), "milp")


def test_auto_says_what_it_picked_and_why():
    solution = solve(layered_problem(40, rank=0), "auto")
    assert solution.details["plan"] == [
        "lagrangian: no pair terms, so bound and incumbent leave little to decide",
    ]
    small = solve(small_problem(3), "auto")
    assert small.details["plan"] == ["brute-force: few enough choices to evaluate all"]


@pytest.mark.parametrize("solver", ["milp", "auto"])
def test_a_tight_dual_bound_needs_no_semidefinite_one_before_the_proof(solver):
    solution = solve(layered_problem(60, degree=6), solver, time_limit=60.0, seed=0)
    assert solution.status is Status.OPTIMAL
    assert "semidefinite_s" not in solution.timing


def test_a_loose_dual_bound_is_raised_by_a_semidefinite_one_before_a_wider_search():
    solution = solve(dense_pairs(14, 3, seed=4), "auto", time_limit=60.0, seed=0)
    assert solution.status is Status.OPTIMAL
    assert "anneal" not in [turn["solver"] for turn in solution.details["turns"]]


def test_auto_begins_no_integer_program_that_is_too_large(monkeypatch):
    monkeypatch.setattr("solvers.composites.auto.MAX_PRODUCTS", 0)
    solution = solve(layered_problem(60, degree=6), "auto", time_limit=5.0, seed=0)
    assert solution.details["turns"][2]["solver"] != "milp"


def test_auto_keeps_the_best_choice_and_bound_of_all_it_ran():
    problem = layered_problem(40, degree=3, seed=5)
    auto, lagrangian = solve(problem, "auto", seed=0, time_limit=10.0), solve(problem, "lagrangian", seed=0)
    assert auto.objective <= lagrangian.objective
    assert auto.bound >= lagrangian.bound - 1e-9
    assert len(auto.details["plan"]) >= 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_greedy_choice_is_within_its_budgets(data):
    problem = small_problem(data.draw(st.integers(0, 10**6)))
    found = solve(problem, "greedy", seed=0)
    assert found.status in (Status.FEASIBLE, Status.UNKNOWN)
    if found.choice is not None:
        assert problem.evaluate(found.choice).feasible
    elif len(problem.budgets) < 2:
        pytest.fail("one budget that some choice meets, and none was found")


def test_equal_groups_of_one_option_are_decided():
    problem = Problem(["a", "b"], [["x"], ["y"]], [2.0, 3.0], {}, {}, PairTerms(factor=[[1.0], [4.0]]))
    for solver in ("brute-force", "milp", "lagrangian", "greedy", "auto"):
        assert solve(problem, solver).objective == 9.0


@pytest.mark.parametrize(("solver", "module", "name"), [
    ("milp", "milp", "_highs"), ("miqp", "miqp", "_Program"), ("cp-sat", "cp_sat", "_Program"),
])  # fmt: skip
def test_a_failure_of_the_external_code_ends_the_run_with_the_best_choice_so_far(solver, module, name, monkeypatch):
    def fails(*_, **__):
        raise Exception("SCIP: error in input data!")

    problem = layered_problem(12, rank=6, seed=3)
    try:
        monkeypatch.setattr(f"solvers.exact.{module}.{name}", fails)
        found = solve(problem, solver, seed=0, presolve=False)
    except SolverUnavailableError:
        return
    assert (found.status, found.stop_reason) == (Status.FEASIBLE, StopReason.ERROR_RECOVERED)
    assert found.details["error"] == "Exception: SCIP: error in input data!"


def test_a_pareto_list_that_would_take_longer_than_the_time_is_not_made(monkeypatch):
    rng = np.random.default_rng(0)
    problem = Problem([f"g{i}" for i in range(40)], [["x", "y", "z"]] * 40, rng.random(120),
                      {name: rng.random(120) for name in "abc"}, dict.fromkeys("abc", 16.0))  # fmt: skip
    monkeypatch.setattr("solvers.bounds.pareto_lists.GRACE_S", -1e9)
    found = solve(problem, "dp", time_limit=60)
    assert found.stop_reason is StopReason.TIME_LIMIT


@pytest.mark.parametrize("solver", ["dp", "lagrangian"])
def test_a_group_may_have_more_options_than_two_bytes_number(solver):
    many, few = 40_000, 60
    use = [np.arange(many, dtype=float), 37.0 * np.arange(few)]
    cost = [1.0 - (use[0] / use[0][-1]) ** 2, 0.3 * (1.0 - (use[1] / use[1][-1]) ** 2)]  # far above its convex hull
    options = [[f"a{i}" for i in range(many)], [f"b{i}" for i in range(few)]]
    budget = 0.9 * use[0][-1]
    problem = Problem(["a", "b"], options, np.concatenate(cost), {"bytes": np.concatenate(use)}, {"bytes": budget})
    least = np.where(use[0][:, None] + use[1] <= budget, cost[0][:, None] + cost[1], np.inf).min()
    found = solve(problem, solver)
    assert found.objective == pytest.approx(least, rel=1e-9)
    assert found.bound <= least * (1 + 1e-9)
