"""`compare`: every run kept, one yardstick for all, the same table after a round trip through its file."""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from formulations import FileFormatError, Problem
from formulations.files import write_json
from formulations.generators.random_instances import layered_problem
from qcompress.errors import MissingError
from qcompress.plots import plot_anytime, plot_profile
from solvers import InvalidOptionError, Solution, Solver, Status, StopReason, TracePoint, UnknownSolverError
from solvers.compare.runs import Comparison, Suite, anytime, compare, performance_profile, time_to_target
from solvers.compare.time_to_target import share_interval
from solvers.heuristic.anneal import Anneal
from solvers.journal import Journal
from tests.compare.own_solvers import ODD, Dice, Odd


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


@dataclass(frozen=True)
class Loud(Dice):
    name = "loud"

    def run(self, problem, search):
        raise RuntimeError("one\n  two")


@dataclass(frozen=True, eq=False)
class Weighted(LinearOnly):
    name = "weighted"
    native_pairs = True
    weights: Any = None


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
    assert "| to 1% |" in loaded.to_markdown()
    assert loaded.rows() == comparison.rows()
    for one, other in zip(anytime(loaded), anytime(comparison), strict=True):
        assert np.array_equal(one.median, other.median)


def test_names_and_messages_of_others_keep_tables_in_shape():
    compared = compare(PROBLEM, {"a|b": Dice(rolls=1), "loud": Loud()}, seeds=(0,))
    lines = compared.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:4]}) == 1
    assert table[2].startswith(r"| a\|b |")
    assert "Failed: loud, seed 0 (RuntimeError: one two)." in lines


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
        ([Dice], (1, 1), InvalidOptionError, "given twice: 1"),
        (["nobody"], (0,), UnknownSolverError, "no solver is called 'nobody'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(solvers, seeds, error, message):
    with pytest.raises(error, match=message):
        compare(PROBLEM, solvers, seeds=seeds)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_unreachable_budget_is_a_proven_row_and_the_other_problems_run(jobs, tmp_path):
    impossible = PROBLEM.with_budgets(bytes=1)
    settings = {"seeds": (0, 1), "journal": tmp_path / "runs.jsonl"}
    suite = compare({"possible": PROBLEM, "impossible": impossible}, ["brute-force", Dice], jobs=jobs, **settings)
    assert suite["possible"].best == compare(PROBLEM, ["brute-force"]).best
    assert [dict(row.statuses) for row in suite["impossible"].rows()] == [{"INFEASIBLE": 2}] * 2
    assert not suite["impossible"].errors
    assert "Proven: no choice meets the budget for bytes: asked for at most 1" in suite.to_markdown()
    again = []
    alone = compare(impossible, ["brute-force"], on_run=lambda *run: again.append(run), **settings)
    assert not again
    assert alone.infeasible


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


# --- several problems, several processes ---------------------------------------------------------------------------

PROBLEMS = {"one": PROBLEM, "linear": layered_problem(6, rank=0, seed=2)}


@pytest.fixture(scope="module")
def suite():
    return compare(PROBLEMS, [Dice, "brute-force", LinearOnly], seeds=(0, 1))


def test_several_problems_are_each_compared_as_alone(suite):
    assert list(suite.comparisons) == ["one", "linear"]
    for name, problem in PROBLEMS.items():
        alone = compare(problem, [Dice, "brute-force", LinearOnly], seeds=(0, 1))
        assert suite[name].problem_fingerprint == problem.fingerprint()
        assert [(row.label, row.best, row.median) for row in suite[name].rows()] == [
            (row.label, row.best, row.median) for row in alone.rows()
        ]
        assert suite[name].skipped == alone.skipped


def test_the_table_over_all_problems_counts_runs(suite):
    rows = {row.label: row for row in suite.rows()}
    assert (rows["brute-force"].problems, rows["linear-only"].problems) == (2, 1)
    assert rows["brute-force"].proven_share == rows["brute-force"].target_share == 1.0
    assert rows["dice"].proven_share < 1.0
    assert rows["dice"].gap > rows["brute-force"].gap == 0.0
    assert suite.rows()[0].label == "brute-force"


def test_problems_that_are_proven_infeasible_count_as_proven_and_towards_nothing_else():
    clash = Problem(["a", "b"], [["x", "y"]] * 2, [0.0] * 4, {"u": [0, 2, 0, 2], "v": [2, 0, 2, 0]}, {"u": 1, "v": 1})
    impossible = {"unreachable": PROBLEM.with_budgets(bytes=1), "clash": clash}
    with_others = {row.label: row for row in compare({"one": PROBLEM, **impossible}, ["brute-force", Dice]).rows()}
    alone = {row.label: row for row in compare({"one": PROBLEM}, ["brute-force", Dice]).rows()}
    assert with_others["brute-force"].proven_share == 1.0
    assert with_others["brute-force"].problems == 3
    for label, row in with_others.items():
        assert (row.feasible_share, row.target_share) == (1.0, alone[label].target_share)
        assert row.gap == alone[label].gap
    nothing_else = compare(impossible, ["brute-force"])
    (row,) = nothing_else.rows()
    assert (row.proven_share, row.feasible_share, row.target_share, row.mean_target_s) == (1.0, None, None, None)
    assert "| brute-force | 2 | – | 100% | – |" in nothing_else.to_markdown()
    profile, *_ = performance_profile(compare({"one": PROBLEM, **impossible}, [Dice]))
    assert profile.share[-1] == performance_profile(compare({"one": PROBLEM}, [Dice]))[0].share[-1]
    assert performance_profile(nothing_else)[0].share[-1] == 0.0


def test_a_suite_comes_back_from_its_file_and_others_are_refused(suite, comparison, tmp_path):
    suite.save(tmp_path / "suite.json")
    assert Suite.load(tmp_path / "suite.json").to_markdown() == suite.to_markdown()
    comparison.save(tmp_path / "comparison.json")
    with pytest.raises(FileFormatError, match="is not a qcompress comparison suite file"):
        Suite.load(tmp_path / "comparison.json")
    write_json(tmp_path / "suite.json", {**suite.to_json(), "comparisons": {"one": {}}})
    with pytest.raises(FileFormatError, match="is not a qcompress comparison file"):
        Suite.load(tmp_path / "suite.json")


@pytest.mark.parametrize("problem", [PROBLEM.cost, {"one": PROBLEM, "two": "problem.npz"}])
def test_what_is_no_problem_is_refused(problem):
    with pytest.raises(InvalidOptionError, match="compare takes a formulations.Problem or several by name, found "):
        compare(problem, [Dice])


def test_no_process_at_all_is_refused():
    with pytest.raises(InvalidOptionError, match="found 0"):
        compare(PROBLEM, [Dice], jobs=0)


# --- the journal ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breaks(Solver):
    """Ends the program, as the user would, at its second run."""

    name = "breaks"
    summary = "is interrupted with seed 1"

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        if search.seed == 1 and BROKEN:
            raise KeyboardInterrupt


BROKEN = [True]


def test_a_cut_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    solver = Breaks()
    with pytest.raises(KeyboardInterrupt):
        compare(PROBLEM, [Dice, solver], seeds=(0, 1, 2), journal=path)
    monkeypatch.setattr(f"{__name__}.BROKEN", [])
    told = []
    comparison = compare(
        PROBLEM, [Dice, solver], seeds=(0, 1, 2), journal=path, on_run=lambda label, run: told.append((label, run.seed))
    )
    label = next(label for label in comparison.solutions if label.startswith("breaks"))
    assert told == [(label, 1), (label, 2)]
    whole = compare(PROBLEM, [Dice, solver], seeds=(0, 1, 2))
    assert [(row.label, row.median, row.best) for row in comparison.rows()] == [
        (row.label, row.median, row.best) for row in whole.rows()
    ]


def test_runs_are_told_apart_by_all_that_decides_them(tmp_path):
    path = tmp_path / "runs.jsonl"
    told = []

    def run(problem=PROBLEM, solver=Dice, **settings):
        compare(problem, [solver], journal=path, on_run=lambda label, _: told.append(label), **settings)

    for _ in range(2):
        run()
        run(solver=Dice(rolls=6))
        run(seeds=(1,))
        run(time_limit=5.0)
        run(problem=PROBLEMS["linear"])
    assert len(told) == 5


def test_a_line_that_was_cut_is_run_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    first = compare(PROBLEM, [Dice], seeds=(0, 1), journal=path)
    whole, told = path.read_bytes(), []
    for length in range(len(whole) - 1, whole.index(b"\n") + 1, -200):
        path.write_bytes(whole[:length])
        again = compare(PROBLEM, [Dice], seeds=(0, 1), journal=path, on_run=lambda label, run: told.append(run.seed))
        assert [run.objective for run in again.solutions["dice"]] == [run.objective for run in first.solutions["dice"]]
        assert len(path.read_bytes().splitlines()) == 2
        assert Journal(path)
    assert set(told) == {1}
    assert len(told) > 3


@pytest.mark.parametrize(
    "content", [b"something else\n", b"no line", b'{"kind": "qcompress journal", "version": 9}\n', b"\n"]
)
def test_no_other_file_is_taken_for_a_journal_or_changed(content, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"notes\.txt"):
        compare(PROBLEM, [Dice], journal=path)
    assert path.read_bytes() == content


# --- time to target and profiles -----------------------------------------------------------------------------------


def test_time_to_target_is_the_formula_at_the_best_restart():
    hit = [run_of([(1.0, 9.0, None), (2.0, 5.0, None)], 10.0, 5.0)] * 5
    late = [run_of([(8.0, 5.0, None)], 10.0, 5.0)]
    never = [run_of([(0.1, 6.0, None)], 10.0, 6.0)] * 4
    found = time_to_target([*hit, *late, *never], 5.0)
    assert (found.runs, found.hits, found.restart_s) == (10, 6, 2.0)  # at 8 s: 8·ln(0.01)/ln(0.4) = 40 s
    assert found.seconds == pytest.approx(2.0 * np.log(0.01) / np.log(0.5))
    low, high = share_interval(5, 10)
    assert found.low_s == pytest.approx(2.0 * np.log(0.01) / np.log(1 - high))
    assert found.high_s == pytest.approx(2.0 * np.log(0.01) / np.log(1 - low))


def test_time_to_target_without_a_hit_is_no_number_and_with_all_hits_no_certainty():
    never = time_to_target([run_of([(0.1, 6.0, None)], 10.0, 6.0), run_of([], 10.0, None)], 5.0)
    assert (never.hits, never.seconds, never.low_s, never.high_s) == (0, None, None, None)
    always = time_to_target([run_of([(3.0, 5.0, None)], 10.0, 5.0)] * 2, 5.0)
    assert always.seconds == always.low_s == 3.0
    assert always.high_s > 3.0 * 5


@pytest.mark.parametrize("hits", range(11))
def test_the_interval_of_a_share_has_the_tails_of_the_binomial(hits):
    binom = pytest.importorskip("scipy.stats").binom
    low, high = share_interval(hits, 10)
    assert hits == 0 or binom.sf(hits - 1, 10, low) == pytest.approx(0.025)
    assert hits == 10 or binom.cdf(hits, 10, high) == pytest.approx(0.025)
    assert (low == 0.0, high == 1.0) == (hits == 0, hits == 10)


def test_a_profile_counts_tasks_within_a_multiple_of_the_quickest():
    def one(times):
        return tuple(run_of([] if t is None else [(t, 5.0, None)], 10.0, None if t is None else 5.0) for t in times)

    compared = Comparison(
        problem_fingerprint="", time_limit=None, seeds=(0, 1, 2, 3), skipped={"c": "absent"},
        solutions={"a": one([1.0, 2.0, 4.0, None]), "b": one([2.0, 2.0, 1.0, None])},
    )  # fmt: skip
    profiles = {
        profile.label: dict(zip(profile.ratio, profile.share, strict=True)) for profile in performance_profile(compared)
    }
    assert profiles == {
        "a": {1.0: 0.5, 2.0: 0.5, 4.0: 0.75},
        "b": {1.0: 0.5, 2.0: 0.75, 4.0: 0.75},
        "c": {1.0: 0.0, 2.0: 0.0, 4.0: 0.0},
    }


def test_the_profile_s_target_is_a_share_above_the_best():
    near, best = run_of([(1.0, 5.04, None)], 10.0, 5.04), run_of([(9.0, 5.0, None)], 10.0, 5.0)
    compared = Comparison(
        problem_fingerprint="", time_limit=None, seeds=(0,), skipped={}, solutions={"near": (near,), "best": (best,)}
    )
    assert [profile.share[-1] for profile in performance_profile(compared, within=0.01)] == [1.0, 1.0]
    assert [profile.share[-1] for profile in performance_profile(compared, within=0.0)] == [0.0, 1.0]


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


def test_profiles_are_drawn_for_one_problem_and_for_several(comparison, suite, tmp_path):
    pytest.importorskip("matplotlib")
    for number, compared in enumerate((comparison, suite, comparison_of(run_of([], 1.0, None)))):
        plot_profile(compared, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


@dataclass(frozen=True)
class Broken(Solver):
    """Fails with every odd seed."""

    name = "broken"
    summary = "fails with every odd seed"

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        if search.seed % 2:
            raise RuntimeError(f"seed {search.seed} is odd")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_a_row_and_ends_nothing_else(tmp_path, jobs):
    run = {"seeds": (0, 1), "journal": tmp_path / "runs.jsonl", "jobs": jobs}
    comparison = compare(PROBLEM, [Broken(), Dice()], **run)
    assert comparison.errors == {"broken, seed 1": "RuntimeError: seed 1 is odd"}
    rows = {row.label: row for row in comparison.rows()}
    assert rows["broken"].feasible_share == 0.5
    assert rows["dice"].feasible_share == 1.0
    assert "Failed: broken, seed 1 (RuntimeError: seed 1 is odd)." in comparison.to_markdown()
    comparison.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json").errors == comparison.errors
    again = []
    compare(PROBLEM, [Broken(), Dice()], **run, on_run=lambda label, solution: again.append((label, solution.seed)))
    assert again == [("broken", 1)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_whose_result_cannot_be_stored_is_a_row_and_ends_nothing_else(tmp_path, jobs):
    solvers = [*(Odd(kind=kind) for kind in (*ODD, "untold")), Dice()]
    comparison = compare(PROBLEM, solvers, jobs=jobs, journal=tmp_path / "runs.jsonl")
    comparison.save(tmp_path / "comparison.json")
    assert comparison.solutions["dice"][0].feasible
    assert len(comparison.errors) == len(ODD) + 1
    assert comparison.errors["odd, seed 0"].startswith("SolverError: JSON cannot store its result: ValueError: Out of")
    assert comparison.errors["odd(kind='untold'), seed 0"] == "UntoldError (its text raises LookupError)"


@dataclass(frozen=True)
class Quits(Solver):
    name = "quits"
    summary = "ends its process, or tries to"

    def run(self, problem, search):
        raise SystemExit(3)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_tries_to_end_the_process_is_a_row(jobs):
    comparison = compare(PROBLEM, [Quits(), Dice()], jobs=jobs)
    assert comparison.errors == {"quits, seed 0": "SystemExit: 3"}
    assert comparison.solutions["dice"][0].feasible


def test_options_and_limits_of_numpy_are_kept_in_full(tmp_path):
    """Arrays of more than 1,000 entries differ in the middle, where their repr has dots."""
    weights = [np.where(np.arange(2000) == 1000, middle, 1.0) for middle in (0.0, 1.0)]
    runs = [
        compare(
            PROBLEM, {"weighted": Weighted(weights=array), "anneal": Anneal(sweeps=np.int64(5))},
            time_limit=np.int64(2), seeds=[np.int64(3)], journal=tmp_path / "runs.jsonl",
        )
        for array in weights
    ]  # fmt: skip
    runs[0].save(tmp_path / "comparison.json")
    loaded = Comparison.load(tmp_path / "comparison.json")
    assert loaded.solutions["weighted"][0].options["weights"][999:1002] == [1.0, 0.0, 1.0]
    assert loaded.solutions["anneal"][0].options["sweeps"] == 5
    assert runs[1].solutions["weighted"][0].options["weights"][1000] == 1.0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3  # the second run repeats only what differs


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"seeds": [1.5]}, "seed must be a whole number from 0, found 1.5"),
        ({"seeds": [-1]}, "seed must be a whole number from 0, found -1"),
        ({"time_limit": 0}, "time_limit must be a positive number of seconds, found 0"),
        ({"solvers": "greedy"}, "a list of solvers or a mapping of labels, found 'greedy' alone"),
    ],
)
def test_what_no_run_could_take_is_refused_before_any(given, error, tmp_path):
    with pytest.raises(InvalidOptionError, match=error):
        compare(PROBLEM, **{"solvers": ["greedy"], "journal": tmp_path / "runs.jsonl", **given})
    assert not (tmp_path / "runs.jsonl").exists()
