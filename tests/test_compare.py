"""`compare`: every run kept, one yardstick for all, the same table after a round trip through its file."""

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest

from formulations import FileFormatError, InfeasibleBudgetError
from formulations.files import write_json
from formulations.instances import layered_problem
from qcompress.errors import MissingError
from qcompress.plots import plot_anytime
from solvers import InvalidOptionError, Solution, Solver, Status, StopReason, TracePoint, UnknownSolverError
from solvers.compare import Comparison, anytime, compare


@dataclass(frozen=True)
class Dice(Solver):
    """Random choices; a solver whose answer depends on the seed."""

    name = "dice"
    summary = "random choices"

    rolls: int = 5

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        for _ in range(self.rolls):
            search.offer(search.rng.integers(0, np.diff(problem.group_offsets)))


@dataclass(frozen=True)
class LinearOnly(Solver):
    name = "linear-only"
    summary = "takes no pair terms"
    native_pairs = False

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)


@dataclass(frozen=True)
class Missing(LinearOnly):
    name = "missing"
    requires = ("a_package_that_is_not_there",)


PROBLEM = layered_problem(5, bits=(2, 4, 8), rank=2, seed=1)


@pytest.fixture(scope="module")
def comparison():
    return compare(PROBLEM, [Dice, Dice(rolls=1), "brute-force", LinearOnly, Missing], seeds=(0, 1, 2))


def test_every_solver_runs_once_per_seed_and_every_run_is_kept(comparison):
    assert list(comparison.solutions) == ["dice", "dice(rolls=1)", "brute-force"]
    for runs in comparison.solutions.values():
        assert [run.seed for run in runs] == [0, 1, 2]
        assert all(run.problem_fingerprint == comparison.problem_fingerprint for run in runs)


def test_what_could_not_run_is_named_with_its_reason(comparison):
    assert "takes no pair terms" in comparison.skipped["linear-only"]
    assert "needs a_package_that_is_not_there" in comparison.skipped["missing"]
    assert "Not run: linear-only (solver 'linear-only' takes no pair terms" in comparison.to_markdown()


def test_all_are_measured_against_the_best_bound_of_any(comparison):
    rows = {row.label: row for row in comparison.rows()}
    optimum = comparison.solutions["brute-force"][0].objective
    assert comparison.best == comparison.bound == optimum
    assert rows["brute-force"].gap == rows["brute-force"].above_best == 0.0
    assert rows["brute-force"].statuses == {"OPTIMAL": 3}
    objectives = [run.objective for run in comparison.solutions["dice(rolls=1)"]]
    assert rows["dice(rolls=1)"].median == np.median(objectives)
    assert rows["dice(rolls=1)"].gap == pytest.approx((np.median(objectives) - optimum) / abs(np.median(objectives)))
    assert rows["dice(rolls=1)"].bound is None
    assert comparison.rows()[0].label == "brute-force"


def test_the_table_is_sorted_by_the_median_objective(comparison):
    medians = [row.median for row in comparison.rows()]
    assert medians == sorted(medians)


def test_a_comparison_comes_back_from_its_file(comparison, tmp_path):
    path = tmp_path / "comparison.json"
    comparison.save(path)
    loaded = Comparison.load(path)
    assert loaded.to_markdown() == comparison.to_markdown()
    assert loaded.rows() == comparison.rows()
    for one, other in zip(anytime(loaded), anytime(comparison), strict=True):
        assert np.array_equal(one.median, other.median)


def test_other_files_are_refused(comparison, tmp_path):
    path = tmp_path / "comparison.json"
    comparison.save(path)
    whole = json.loads(path.read_text())
    for changes in ({"kind": "x"}, {"version": 99}, {"solutions": 3}, {"solutions": {"a": [{}]}}, {"seeds": None}):
        write_json(path, {**whole, **changes})
        with pytest.raises(FileFormatError, match=r"comparison\.json"):
            Comparison.load(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FileFormatError, match=r"comparison\.json is not a"):
        Comparison.load(path)


@pytest.mark.parametrize(
    ("solvers", "seeds", "error", "message"),
    [
        ([], (0,), InvalidOptionError, "at least one solver and one seed"),
        ([Dice], (), InvalidOptionError, "at least one solver and one seed"),
        ([Dice, Dice()], (0,), InvalidOptionError, "given twice: dice"),
        (["nobody"], (0,), UnknownSolverError, "no solver is called 'nobody'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(solvers, seeds, error, message):
    with pytest.raises(error, match=message):
        compare(PROBLEM, solvers, seeds=seeds)


def test_an_unreachable_budget_is_refused():
    with pytest.raises(InfeasibleBudgetError, match="bytes: asked for at most 1"):
        compare(PROBLEM.with_budgets(bytes=1), [Dice])


def test_every_run_is_told_as_it_ends():
    told = []
    compare(PROBLEM, [Dice], seeds=(4, 5), on_run=lambda label, run: told.append((label, run.seed)))
    assert told == [("dice", 4), ("dice", 5)]


# --- anytime curves ------------------------------------------------------------------------------------------------


def run_of(trace, wall_s, objective):
    return Solution(
        choice=None, objective=objective, usage={}, feasible=objective is not None, bound=None, gap=None,
        status=Status.UNKNOWN if objective is None else Status.FEASIBLE, stop_reason=StopReason.COMPLETED,
        wall_s=wall_s, trace=tuple(TracePoint(*point) for point in trace),
    )  # fmt: skip


def comparison_of(*runs):
    return Comparison(
        problem_fingerprint="", time_limit=None, seeds=tuple(range(len(runs))), solutions={"s": runs}, skipped={}
    )


def test_a_curve_is_the_median_of_step_functions():
    first = run_of([(1.0, 10.0, None), (3.0, 4.0, None)], 5.0, 4.0)
    second = run_of([(2.0, 8.0, None), (2.5, 8.0, 1.0)], 4.0, 8.0)
    third = run_of([(2.0, 6.0, None)], 4.0, 6.0)
    (curve,) = anytime(comparison_of(first, second, third))
    at = dict(zip(curve.t_s.tolist(), zip(curve.lowest, curve.median, curve.highest, strict=True), strict=True))
    assert at[0.0] == (np.inf, np.inf, np.inf)
    assert at[1.0] == (10.0, np.inf, np.inf)
    assert at[2.0] == (6.0, 8.0, 10.0)
    assert at[3.0] == (4.0, 6.0, 8.0)
    assert at[5.0] == (4.0, 6.0, 8.0)


def test_curves_never_rise(comparison):
    for curve in anytime(comparison):
        for values in (curve.lowest, curve.median, curve.highest):
            assert all(later <= earlier for earlier, later in itertools.pairwise(values))
        assert np.isfinite(curve.median[-1])


def test_runs_without_a_choice_count_as_infinite():
    comparison = comparison_of(run_of([], 1.0, None), run_of([(0.5, 3.0, None)], 1.0, 3.0))
    (row,) = comparison.rows()
    assert (row.best, row.median, row.feasible_share, row.gap) == (3.0, None, 0.5, None)
    (curve,) = anytime(comparison)
    assert curve.median[-1] == np.inf
    assert curve.lowest[-1] == 3.0
    assert "50%" in comparison.to_markdown()


# --- the picture ---------------------------------------------------------------------------------------------------


def test_the_plot_is_a_png_written_whole(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "anytime.png"
    plot_anytime(comparison, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["anytime.png"]


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no run found a choice"):
        plot_anytime(comparison_of(run_of([], 1.0, None)), tmp_path / "anytime.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_plot_says_what_to_install(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingError, match=r"pip install 'qcompress\[plots\]'"):
        plot_anytime(comparison, tmp_path / "anytime.png")
