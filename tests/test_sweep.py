"""`sweep`: every point as good as brute force, never worse than a tighter one, with prices that tell what more buys."""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import FileFormatError, InfeasibleBudgetError, PairTerms, Problem
from formulations.files import write_json
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled
from qcompress.plots import plot_sweep
from solvers import InvalidOptionError, Solver, Status, StopReason, judge, solve
from solvers.exact.brute_force import BruteForce
from solvers.nested_sweep import is_nested
from solvers.solution_update import with_known
from solvers.sweep import Sweep, SweepPoint, sweep

PROBLEM = layered_problem(5, bits=(2, 4, 8), rank=2, seed=1)


@dataclass(frozen=True)
class Forgetful(Solver):
    """Good at the first point, random at the others, whatever it is given to start from."""

    name = "forgetful"
    summary = "random"
    presolved = False

    def run(self, problem, search):
        search.choice = search._evaluation = None
        for _ in range(3):
            search.offer(search.rng.integers(0, np.diff(problem.group_offsets)))


@dataclass(frozen=True)
class Interrupted(Solver):
    """The user loses patience at the third point."""

    name = "interrupted"
    summary = "stops"
    presolved = False

    def run(self, problem, search):
        search.offer(problem.group_offsets[:-1] * 0)
        RUNS.append(problem.budgets["bytes"])
        if len(RUNS) == 3:
            raise KeyboardInterrupt


RUNS = []


@pytest.fixture(autouse=True)
def no_runs():
    RUNS.clear()


@pytest.mark.parametrize("seed", range(6))
def test_every_point_is_proven_as_brute_force_finds_it(seed):
    problem = small_problem(seed)
    for resource in problem.resources:
        for point in sweep(problem, resource, 5).points:
            at_budget = problem.with_budgets(**{resource: point.budget})
            oracle = solve(at_budget, "brute-force")
            assert point.solution.status == oracle.status
            assert point.price >= 0
            if oracle.choice is not None:
                assert point.solution.objective == pytest.approx(oracle.objective, abs=1e-9)
                assert point.solution.gap == 0.0
                judged = at_budget.evaluate(point.solution.choice)
                assert (judged.feasible, judged.usage) == (True, point.solution.usage)
                assert judged.objective == point.solution.objective
            assert point.solution.problem_fingerprint == at_budget.fingerprint()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 7))
def test_whatever_the_solver_does_the_curve_falls_and_the_bounds_hold(seed, points):
    problem = layered_problem(4, bits=(2, 4, 8), rank=2, seed=seed % 1000)
    curve = sweep(problem, "bytes", points, solver=Forgetful, seed=seed)
    known = [point.solution.objective for point in curve.points if point.solution.objective is not None]
    assert known == sorted(known, reverse=True)
    bounds = [point.solution.bound for point in curve.points]
    assert bounds == sorted(bounds, reverse=True)
    first = [point.solution.choice is not None for point in curve.points].index(True)
    assert all(point.solution.choice is not None for point in curve.points[first:])  # it fits looser budgets as well
    for point in curve.points:
        optimum = solve(problem.with_budgets(bytes=point.budget), "brute-force").objective
        assert point.solution.bound <= optimum + 1e-9
        assert point.solution.objective is None or point.solution.objective >= optimum - 1e-9


def test_each_point_starts_from_the_tighter_one():
    starts = []

    @dataclass(frozen=True)
    class Starts(Solver):
        name = "starts"
        summary = "notes what it is given"
        presolved = False

        def run(self, problem, search):
            starts.append(None if search.initial is None else search.initial.tolist())
            search.offer([0] * problem.num_groups)
            search.offer(solve(problem, "brute-force").choice)

    curve = sweep(PROBLEM, "bytes", 4, solver=Starts)
    assert starts == [None, *(point.solution.choice.tolist() for point in curve.points[:-1])]


def test_points_are_spaced_from_the_least_to_the_most_or_as_asked():
    least, most = PROBLEM.minimum_usage()["bytes"], float(PROBLEM.resources["bytes"].reshape(-1, 3)[:, -1].sum())
    budgets = [point.budget for point in sweep(PROBLEM, "bytes", 4, solver="greedy").points]
    assert budgets[0], budgets[-1] == (least, most)
    assert np.diff(np.log(budgets)) == pytest.approx(np.full(3, np.log(most / least) / 3), rel=1e-3)
    assert all(budget == int(budget) for budget in budgets)
    asked = sweep(PROBLEM, "bytes", [most, least + 5, least + 5], solver="greedy")
    assert [point.budget for point in asked.points] == [least + 5, most]
    fractions = Problem(["a"], [["x", "y"]], [1, 0], {"s": [0.0, 0.5]}, {})
    assert [point.budget for point in sweep(fractions, "s", 3).points] == [0.0, 0.25, 0.5]


def test_other_budgets_stay():
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [2, 0, 3, 0], {"s": [1, 2, 1, 2], "t": [0, 1, 0, 1]}, {"t": 1})
    assert [point.solution.objective for point in sweep(problem, "s", [2, 3, 4]).points] == [5.0, 2.0, 2.0]


def test_the_price_is_the_slope_of_the_curve():
    problem = layered_problem(400, rank=0, seed=3)
    least, most = problem.minimum_usage()["bytes"], float(problem.resources["bytes"].reshape(-1, 6)[:, -1].sum())
    curve = sweep(problem, "bytes", np.linspace(least, most, 8)[1:-1])
    for point in curve.points:
        for step in (-0.1 * point.budget, 0.1 * point.budget):  # no tangent to a convex curve is above it
            there = solve(problem.with_budgets(bytes=point.budget + step))
            tangent = point.solution.objective - point.price * step
            assert there.bound >= tangent - 0.01 * point.solution.objective


def test_the_price_at_the_smallest_use_is_what_the_next_step_buys():
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [9, 0, 4, 0], {"s": [1, 3, 1, 2]}, {})
    for points in (2, [2, 2.5]):
        tight = sweep(problem, "s", points).points[0]
        assert tight.price == pytest.approx(4.5)  # group a: 9 for 2
        assert tight.solution.usage == {"s": 2.0}
    assert sweep(Problem(["a"], [["x"]], [1], {"s": [2]}, {}), "s", 3).points[0].price == 0.0


@pytest.mark.parametrize("rank", [0, 2])
def test_prices_are_in_the_problem_s_units(rank):
    problem = layered_problem(8, rank=rank, seed=3, budget=0.2)
    kilo = Problem(
        problem.groups,
        problem.options,
        problem.cost,
        {"bytes": problem.resources["bytes"] / 1024},
        {},
        problem.pairs,
    )
    budget = problem.budgets["bytes"]
    (plain,) = sweep(problem, "bytes", [budget]).points
    (tiny,) = sweep(scaled(problem, 1e-9).problem, "bytes", [budget]).points
    (coarse,) = sweep(kilo, "bytes", [budget / 1024]).points
    assert plain.price > 0
    assert tiny.price == pytest.approx(plain.price * 1e-9, rel=1e-3)
    assert coarse.price == pytest.approx(plain.price * 1024, rel=1e-3)


def test_budgets_that_cannot_be_met_together_are_reported_not_hidden():
    use = {"s": [1, 0], "t": [0, 1]}
    problem = Problem(["a"], [["x", "y"]], [0, 0], use, {"t": 0})
    tight, loose = sweep(problem, "s", [0, 1]).points
    assert (tight.solution.status, tight.solution.choice) == (Status.INFEASIBLE, None)
    assert loose.solution.status is Status.OPTIMAL
    assert "INFEASIBLE" in sweep(problem, "s", [0, 1]).to_markdown()


@pytest.mark.parametrize(
    ("resource", "points", "error", "message"),
    [
        ("seconds", 5, InvalidOptionError, "no resource 'seconds'; it has: bytes"),
        ("bytes", 1, InvalidOptionError, "at least 2 points"),
        ("bytes", [], InvalidOptionError, "found \\[\\]"),
        ("bytes", [float("nan")], InvalidOptionError, "found \\[nan\\]"),
        ("bytes", [1.0, 1e9], InfeasibleBudgetError, "bytes: asked for at most 1"),
    ],
)
def test_what_makes_no_curve_is_refused_before_anything_is_solved(resource, points, error, message):
    with pytest.raises(error, match=message):
        sweep(PROBLEM, resource, points, solver=Interrupted)
    assert RUNS == []


def test_options_of_the_solver_are_taken_and_others_refused():
    curve = sweep(PROBLEM, "bytes", 2, solver="anneal", sweeps=7)
    assert all(point.solution.options["sweeps"] == 7 for point in curve.points)
    with pytest.raises(InvalidOptionError, match="no option 'speed'"):
        sweep(PROBLEM, "bytes", 2, solver="anneal", speed=7)


# --- files and journal ---------------------------------------------------------------------------------------------


def test_a_sweep_comes_back_from_its_file(tmp_path):
    curve = sweep(PROBLEM, "bytes", 4, seed=3)
    curve.save(tmp_path / "sweep.json")
    loaded = Sweep.load(tmp_path / "sweep.json")
    assert loaded.to_json() == curve.to_json()
    assert loaded.to_markdown() == curve.to_markdown()
    assert loaded.problem_fingerprint == PROBLEM.fingerprint()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "sweep.json"
    whole = sweep(PROBLEM, "bytes", 2, solver="greedy").to_json()
    for changes in ({"kind": "x"}, {"version": 9}, {"points": 3}, {"points": [{}]}, {"points": [3]}, {"more": 1}):
        write_json(path, {**whole, **changes})
        with pytest.raises(FileFormatError, match=r"sweep\.json"):
            Sweep.load(path)


def test_an_interrupt_ends_the_curve_and_the_journal_goes_on(tmp_path):
    path = tmp_path / "points.jsonl"
    cut = sweep(PROBLEM, "bytes", 5, solver=Interrupted, journal=path)
    assert len(cut.points) == 3
    assert cut.points[-1].solution.stop_reason is cut.stop_reason is StopReason.INTERRUPTED
    told = []
    whole = sweep(
        PROBLEM, "bytes", 5, solver=Interrupted, journal=path, on_point=lambda point: told.append(point.budget)
    )
    assert [point.budget for point in (*whole.points[:3], *whole.points[2:])] == RUNS
    assert told == RUNS[3:]
    assert [point.budget for point in whole.points[:3]] == [point.budget for point in cut.points]
    again = sweep(PROBLEM, "bytes", 5, solver=Interrupted, journal=path)
    assert len(RUNS) == 6
    assert again.to_json() == whole.to_json()
    assert [json.loads(line)["value"]["budget"] for line in path.read_text().splitlines()] == [*RUNS[:2], *RUNS[3:]]


# --- what is drawn -------------------------------------------------------------------------------------------------


def test_the_band_holds_the_optimum_at_every_budget():
    problem = layered_problem(4, bits=(2, 4, 8), rank=2, seed=5)
    band = sweep(problem, "bytes", 5, solver="greedy").band()
    assert (np.diff(band.budget) >= 0).all()
    for (left, right), lower, upper in zip(band.budget.reshape(-1, 2), band.lower[::2], band.upper[::2], strict=True):
        for budget in np.linspace(left, right, 5):
            optimum = solve(problem.with_budgets(bytes=float(budget)), "brute-force").objective
            assert lower - 1e-12 <= optimum <= upper + 1e-12


def test_the_plot_is_a_png_and_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    plot_sweep(sweep(PROBLEM, "bytes", 4), tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    nothing = Problem(["a"], [["x", "y"]], [0, 0], {"s": [1, 0], "t": [0, 1]}, {"t": 0})
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_sweep(sweep(nothing, "s", [0, 0.5]), tmp_path / "none.png")


# --- what is known from elsewhere ----------------------------------------------------------------------------------


def test_known_choices_and_bounds_only_ever_help():
    best = solve(PROBLEM, "brute-force")
    worse = judge(PROBLEM, [0] * 5)
    assert with_known(PROBLEM, worse, choices=[best.choice]).objective == best.objective
    assert with_known(PROBLEM, best, choices=[worse.choice]).objective == best.objective
    over = [2] * 5
    assert not PROBLEM.evaluate(over).feasible
    assert with_known(PROBLEM, worse, choices=[over]).objective == worse.objective
    proven = with_known(PROBLEM, worse, choices=[best.choice], bounds=[best.objective, None, 0.0])
    assert (proven.status, proven.gap, proven.solver) == (Status.OPTIMAL, 0.0, "given")


def test_a_point_that_is_no_point_is_refused():
    with pytest.raises(FileFormatError, match="here is not a complete qcompress sweep"):
        SweepPoint.from_json({"budget": 3}, "here")


# --- pair terms in budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", ["r0", "r1", "r2"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15)
def test_a_sweep_takes_pair_terms_in_the_swept_resource_and_in_others(resource, seed):
    problem = small_problem(seed, resource_pairs=True)
    if not problem.resource_pairs or resource not in problem.resources:
        return
    judged = [problem.evaluate(c) for c in itertools.product(*(range(len(o)) for o in problem.options))]
    others = [one for one in judged if not set(one.violations) - {resource}]
    if not others:
        return
    uses = sorted({one.usage[resource] for one in others})
    curve = sweep(problem, resource, [uses[0], uses[len(uses) // 2], uses[-1]], seed=0, time_limit=5)
    for point in curve.points:
        best = min(one.objective for one in others if one.usage[resource] <= point.budget * (1 + 1e-12))
        assert point.solution.objective == pytest.approx(best)
        assert point.solution.bound <= best + 1e-9 * (1 + np.abs(problem.cost).sum())
        assert point.price >= 0.0


def test_a_number_of_points_spans_the_uses_of_small_and_large_choices():
    terms = scipy.sparse.csr_array(([4.0, 2.0], ([0, 0], [2, 3])), shape=(4, 4))
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 2, 0, 3], {"m": [1] * 4}, {"m": 6}, resource_pairs={"m": terms})
    curve = sweep(problem, "m", 3)
    assert [point.budget for point in curve.points] == [2, 3, 6]
    assert [point.solution.objective for point in curve.points] == [2, 2, 0]
    with pytest.raises(InvalidOptionError, match="nested"):
        sweep(problem, "m", [2, 6], nested=True)


# --- nested choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_nested_choices_never_shrink_a_part_and_keep_the_bounds(seed):
    problem = layered_problem(6, bits=(2, 4, 8), rank=2, seed=seed)
    plain, curve = (sweep(problem, "bytes", 6, solver="brute-force", nested=nested) for nested in (False, True))
    assert curve.nested
    choices = [point.solution.choice for point in curve.points]
    use = problem.resources["bytes"]
    for smaller, larger in itertools.pairwise(choices):
        assert (use[problem.flat(smaller)] <= use[problem.flat(larger)]).all()
    for free, point in zip(plain.points, curve.points, strict=True):
        assert point.solution.usage["bytes"] <= point.budget
        assert free.solution.bound <= point.solution.objective
        assert point.solution.objective >= free.solution.objective - 1e-12
        assert point.solution.bound == pytest.approx(free.solution.bound)
        judged = judge(problem.with_budgets(bytes=point.budget), point.solution.choice)
        assert judged.objective == point.solution.objective


def test_a_nested_chain_is_the_better_of_the_two_that_brute_force_finds():
    problem = layered_problem(5, bits=(2, 4, 8), rank=2, seed=3)
    curve = sweep(problem, "bytes", 5, solver="brute-force", nested=True)
    plain = sweep(problem, "bytes", 5, solver="brute-force")
    use, starts = problem.resources["bytes"], problem.group_offsets[:-1]
    everything = [np.array(choice) for choice in itertools.product(range(3), repeat=5)]

    def chain(points, fits):
        found = [points[0].solution.choice]
        for point in points[1:]:
            allowed = [
                problem.evaluate(choice).objective
                if problem.evaluate(choice).usage["bytes"] <= point.budget and fits(choice, found[-1])
                else np.inf
                for choice in everything
            ]
            found.append(everything[int(np.argmin(allowed))])
        return [problem.evaluate(choice).objective for choice in found]

    up = chain(plain.points, lambda choice, last: (use[choice + starts] >= use[last + starts]).all())
    down = chain(plain.points[::-1], lambda choice, last: (use[choice + starts] <= use[last + starts]).all())[::-1]
    free = np.array([point.solution.objective for point in plain.points])
    expected = min((down, up), key=lambda objectives: ((np.array(objectives) - free) / np.abs(free)).sum())
    assert [point.solution.objective for point in curve.points] == pytest.approx(expected)


def test_a_nested_sweep_comes_back_from_its_file_and_its_journal(tmp_path, monkeypatch):
    problem = layered_problem(5, bits=(2, 4, 8), rank=2, seed=3)
    curve = sweep(problem, "bytes", 5, solver="greedy", nested=True, journal=tmp_path / "runs.jsonl")
    curve.save(tmp_path / "curve.json")
    loaded = Sweep.load(tmp_path / "curve.json")
    assert loaded.nested
    assert loaded.to_markdown() == curve.to_markdown()
    monkeypatch.setattr("solvers.sweep.solve", lambda *_, **__: pytest.fail("solved again"))
    again = sweep(problem, "bytes", 5, solver="greedy", nested=True, journal=tmp_path / "runs.jsonl")
    assert again.to_markdown() == curve.to_markdown()


@dataclass(frozen=True)
class Pressed(Solver):
    """Brute force, but Ctrl-C is pressed in one of the runs."""

    name = "pressed"
    summary = "brute force until Ctrl-C"
    presolved = False
    at: int = 0

    def run(self, problem, search):
        RUNS.append(0.0)
        if len(RUNS) == self.at:
            raise KeyboardInterrupt
        BruteForce().run(problem, search)


def test_an_interrupt_ends_a_nested_curve_with_choices_that_are_nested():
    rng = np.random.default_rng(2)
    costs, uses = rng.random(15) * 3, {"bytes": rng.integers(1, 30, 15).astype(float)}
    pairs = PairTerms(factor=rng.normal(size=(15, 2)) * 0.5)
    problem = Problem(list("abcde"), [["x", "y", "z"]] * 5, costs, uses, {}, pairs)
    whole = sweep(problem, "bytes", 8, solver=Pressed(), nested=True)
    total = len(RUNS)
    assert (whole.stop_reason, total > 12) == (StopReason.COMPLETED, True)
    for at in range(3, total):
        RUNS.clear()
        cut = sweep(problem, "bytes", 8, solver=Pressed(at=at), nested=True)
        assert (cut.stop_reason, len(RUNS)) == (StopReason.INTERRUPTED, at)
        choices = [point.solution.choice for point in cut.points if point.solution.choice is not None]
        assert len(choices) >= min(at, 8) - 1
        for smaller, larger in itertools.pairwise(choices):
            assert is_nested(problem, "bytes", smaller, larger)


def test_the_bounds_in_the_trace_of_a_nested_choice_hold_for_all_choices():
    for seed in range(40):
        problem = small_problem(seed)
        if "r0" in problem.resources:
            least, most = (extreme.reduceat(problem.resources["r0"], problem.group_offsets[:-1]).sum()
                           for extreme in (np.minimum, np.maximum))  # fmt: skip
            fixed = problem.fixed.get("r0", 0.0)
            for point in sweep(problem, "r0", fixed + np.linspace(least, most, 5), nested=True).points:
                best = solve(problem.with_budgets(r0=point.budget), "brute-force").objective
                bounds = [state.bound for state in point.solution.trace if state.bound is not None]
                assert best is None or max(bounds, default=-np.inf) <= best + 1e-9


def test_a_seed_of_numpy_is_a_number_in_the_file(tmp_path):
    curve = sweep(PROBLEM, "bytes", 2, solver="anneal", seed=np.int64(3))
    curve.save(tmp_path / "sweep.json")
    assert Sweep.load(tmp_path / "sweep.json").seed == 3
