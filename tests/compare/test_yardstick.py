"""What runs are measured by: known values, targets, bootstrap intervals, means; and what is recorded of every run."""

import csv
import importlib
import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from formulations.generators.random_instances import layered_problem
from solvers import InvalidOptionError, Solution, Status, StopReason, TracePoint
from solvers.compare.rows import shifted_geometric_mean
from solvers.compare.runs import Comparison, Suite, compare, performance_profile, time_to_target
from solvers.composites.multi_start import MultiStart
from solvers.composites.portfolio import Portfolio
from solvers.provenance import version
from tests.compare.own_solvers import Dice, Downhill
from tests.quick import slow_but

PROBLEM = layered_problem(5, bits=(2, 4, 8), rank=2, seed=1)
LINEAR = layered_problem(6, rank=0, seed=2)


def run_of(trace, objective, wall_s=10.0):
    return Solution(
        choice=None, objective=objective, usage={}, feasible=objective is not None, bound=None, gap=None,
        status=Status.FEASIBLE, stop_reason=StopReason.COMPLETED, wall_s=wall_s,
        trace=tuple(TracePoint(t, value, None) for t, value in trace),
    )  # fmt: skip


def comparison_of(*runs, **settings):
    seeds = tuple(range(len(runs)))
    return Comparison(
        problem_fingerprint="", time_limit=20.0, seeds=seeds, solutions={"s": runs}, skipped={}, **settings
    )


def test_a_known_value_is_the_reference_unless_a_run_is_better():
    runs = [run_of([(1.0, 10.0), (2.0, 8.0)], 8.0)]
    better_known = comparison_of(*runs, best_known=5.0)
    assert (better_known.reference, better_known.best) == (5.0, 8.0)
    assert better_known.rows()[0].above_best == pytest.approx(3 / 5)
    assert better_known.run_rows()[0]["gap_to_best"] == pytest.approx(3 / 5)
    assert better_known.rows()[0].target_share == 0.0
    assert comparison_of(*runs, best_known=9.0).reference == 8.0


def test_a_bad_objective_is_above_the_best_by_more_than_all_of_it():
    """The gap to a bound is relative to the objective and stays below 1; this one is relative to the best."""
    runs = [run_of([(1.0, 0.7197)], 0.7197)]
    row = comparison_of(*runs, best_known=0.0318).rows()[0]
    assert row.above_best == pytest.approx(0.6879 / 0.0318)
    assert "2163" in comparison_of(*runs, best_known=0.0318).to_markdown()
    assert comparison_of(*runs, best_known=0.0).rows()[0].above_best is None


def test_the_target_is_a_share_above_the_reference_or_what_was_stated():
    runs = [run_of([(1.0, 10.0), (2.0, 8.0)], 8.0)]
    assert comparison_of(*runs, within=0.5).target == 12.0
    assert comparison_of(*runs, within=0.5, best_known=4.0).target == 6.0
    stated = comparison_of(*runs, stated_target=10.0, best_known=4.0)
    assert stated.rows()[0].to_target.seconds == 1.0
    assert stated.target_words == "10"
    assert "to 10 |" in stated.to_markdown()
    (profile,) = performance_profile(stated)
    assert profile.share[-1] == 1.0


def test_a_known_value_below_a_proven_bound_is_said():
    comparison = compare(PROBLEM, ["brute-force"], best_known=-1e9)
    assert "one of the two is wrong" in comparison.to_markdown()
    assert "one of the two is wrong" not in compare(PROBLEM, ["brute-force"], best_known=1e9).to_markdown()


def test_targets_come_back_from_the_file(tmp_path):
    comparison = compare(PROBLEM, [Dice], best_known=1.5, target=2.5, within=0.25)
    comparison.save(tmp_path / "c.json")
    loaded = Comparison.load(tmp_path / "c.json")
    assert (loaded.best_known, loaded.stated_target, loaded.within) == (1.5, 2.5, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best_known": 3.0}, "several problems need best_known by name"),
        ({"target": {"three": 1.0}}, "target names three; the problems are one, two"),
        ({"target": {"one": float("nan")}}, "target must be a finite objective, found nan"),
        ({"within": -0.1}, "within must be a fraction"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_runs(settings, message):
    with pytest.raises(InvalidOptionError, match=message):
        compare({"one": PROBLEM, "two": LINEAR}, [Dice], **settings)


def test_each_problem_of_a_suite_has_its_own_target():
    suite = compare({"one": PROBLEM, "two": LINEAR}, [Dice], target={"one": 1e9}, best_known={"two": -1e9})
    assert suite["one"].rows()[0].target_share == 1.0
    assert suite["two"].rows()[0].target_share == 0.0
    assert suite.rows()[0].target_share == 0.5
    assert suite.target_words == "the targets"


# --- the bootstrap -------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_that_of_a_plain_loop():
    times = [1.0, 2.0, 2.5, 7.0, np.inf, np.inf]
    runs = [run_of([(t, 5.0)] if np.isfinite(t) else [(0.1, 6.0)], 5.0) for t in times]
    found = time_to_target(runs, 5.0)
    drawn = np.random.default_rng(0).integers(6, size=(1000, 6))

    def seconds(sample):
        hits = sorted(t for t in sample if t < np.inf)
        needed = [t if k / 6 >= 0.99 else t * math.log(0.01) / math.log1p(-k / 6) for k, t in enumerate(hits, start=1)]
        return min(needed, default=np.inf)

    expected = sorted(seconds([times[i] for i in row]) for row in drawn)
    assert found.bootstrap_low_s == pytest.approx(expected[25])
    assert found.bootstrap_high_s == pytest.approx(expected[974])
    assert found.bootstrap_low_s <= found.seconds <= found.bootstrap_high_s


def test_where_hits_are_rare_the_bootstrap_has_no_upper_end():
    found = time_to_target([run_of([(1.0, 5.0)], 5.0), *[run_of([(1.0, 6.0)], 6.0)] * 9], 5.0)
    assert found.hits == 1
    assert found.bootstrap_high_s is None
    assert np.isfinite(found.high_s)
    assert "∞" in comparison_of(run_of([(1.0, 5.0)], 5.0), *[run_of([(1.0, 6.0)], 6.0)] * 9).to_markdown()


# --- means ---------------------------------------------------------------------------------------------------------


def test_runs_that_never_reach_the_target_count_with_the_time_limit():
    (row,) = comparison_of(run_of([(3.0, 5.0)], 5.0), run_of([(3.0, 6.0)], 6.0), within=0.0).rows()
    assert row.mean_target_s == pytest.approx(math.sqrt(4.0 * 21.0) - 1.0)
    assert row.mean_wall_s == pytest.approx(10.0)


def test_a_shifted_mean_lies_between_least_and_largest():
    times = np.random.default_rng(0).uniform(0, 100, size=50)
    assert times.min() < shifted_geometric_mean(times) < times.mean() < times.max()


# --- what is recorded ----------------------------------------------------------------------------------------------


def test_every_run_records_processor_time_machine_and_versions():
    comparison = compare(PROBLEM, [Dice, "greedy"], seeds=(0, 1))
    for runs in comparison.solutions.values():
        for run in runs:
            assert run.details["cpu_s"] >= 0.0
            assert run.details["machine"]["cores"] >= 1
            assert run.details["versions"]["qcompress"] == version("qcompress")
    assert "Run on " in comparison.to_markdown()
    dice = comparison.solutions["dice"][0]
    assert dice.details["versions"]["tests.compare.own_solvers"].startswith("sha256:")


def test_the_spreadsheet_has_a_line_for_every_run_and_its_numbers_read_back():
    suite = compare({"one": PROBLEM, "two": LINEAR}, [Dice, "brute-force"], seeds=(0, 1))
    rows = list(csv.DictReader(io.StringIO(suite.to_csv())))
    assert [(row["problem"], row["solver"], row["seed"]) for row in rows] == [
        (problem, solver, seed) for problem in ("one", "two") for solver in ("dice", "brute-force") for seed in "01"
    ]
    runs = [run for name in ("one", "two") for runs in suite[name].solutions.values() for run in runs]
    for row, run in zip(rows, runs, strict=True):
        assert float(row["objective"]) == run.objective
        assert float(row["wall_s"]) == run.wall_s
        assert json.loads(row["options"]) == dict(run.options)
        assert row["bound"] == ("" if run.bound is None else repr(run.bound))
    assert isinstance(suite, Suite)


# --- two of a kind -------------------------------------------------------------------------------------------------


def test_two_instances_of_one_class_are_told_apart_by_labels_also_in_the_journal(tmp_path):
    def run(told):
        return compare(
            PROBLEM, {"zeros": Downhill(), "ones": Downhill(bit=1)}, seeds=(0,), journal=tmp_path / "runs",
            on_run=lambda label, _: told.append(label),
        )  # fmt: skip

    told = []
    first, again = run(told), run(told)
    assert told == ["zeros", "ones"]
    assert list(again.solutions) == ["zeros", "ones"]
    raw = {label: runs[0].details["objective_decoded"] for label, runs in first.solutions.items()}
    assert raw["zeros"] != raw["ones"]
    assert raw == {label: runs[0].details["objective_decoded"] for label, runs in again.solutions.items()}


def test_without_labels_they_are_refused_with_what_would_work():
    with pytest.raises(InvalidOptionError, match="given twice: Downhill; .*give labels"):
        compare(PROBLEM, [Downhill(), Downhill(bit=1)])


def test_a_run_by_another_version_is_made_again(tmp_path, monkeypatch):
    told = []

    def run():
        compare(PROBLEM, [Dice], journal=tmp_path / "runs", on_run=lambda label, _: told.append(label))

    run()
    monkeypatch.setattr("solvers.provenance.version", lambda module: "another")
    run()
    run()
    assert told == ["dice", "dice"]


EDITED = """
import dimod
from tests.compare.own_solvers import Dice, Downhill

class Mine(Dice):
    rolls = 5

def make():
    return dimod.TruncateComposite(Downhill(), 1)
"""


@pytest.mark.parametrize("path", ["edited_here:Mine", "edited_here:make", "edited_here:make:encoding=binary"])
@pytest.mark.parametrize("wrapped", slow_but([None, "portfolio"], [None, "multi-start", "portfolio"]))
def test_a_run_named_by_import_path_is_made_again_when_the_module_was_edited(path, wrapped, tmp_path, monkeypatch):
    """Also in the same process after a reload, but not before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_here", raising=False)
    file = tmp_path / "edited_here.py"
    file.write_text(EDITED)
    told = []

    def run():
        solver = {None: path, "multi-start": MultiStart(path, starts=1), "portfolio": Portfolio(solvers=(path,))}[
            wrapped
        ]
        compare(PROBLEM, [solver], journal=tmp_path / "runs", on_run=lambda label, _: told.append(label))

    run()
    file.write_text(EDITED.replace("Downhill(), 1", "Downhill(bit=1), 1"))
    run()
    assert len(told) == 1
    importlib.reload(sys.modules["edited_here"])
    run()
    run()
    assert len(told) == 2


def test_time_limits_of_one_second_are_the_same_however_they_are_written(tmp_path):
    told = []
    for time_limit in (1, 1.0, np.int64(1)):
        compare(
            PROBLEM, ["greedy"], time_limit=time_limit, journal=tmp_path / "runs", on_run=lambda *run: told.append(run)
        )
    assert len(told) == 1


PACKAGED = """
from dataclasses import dataclass
from solvers import Solver

@dataclass(frozen=True)
class Base(Solver):
    name = "mine"
    summary = "the first options"

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
"""

DERIVED = """
from dataclasses import dataclass
from packaged_solver.base import Base

@dataclass(frozen=True)
class Mine(Base):
    pass
"""


@pytest.mark.parametrize(
    ("edited", "wrapped"),
    [("base", True), ("mine", False),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in [("base", False), ("mine", True)])],
)  # fmt: skip
def test_a_run_by_edited_code_of_an_installed_package_is_made_again(edited, wrapped, tmp_path):
    """Its version stays the same, as with an editable installation."""
    package, information = tmp_path / "packaged_solver", tmp_path / "packaged_solver-1.0.dist-info"
    for folder in (package, information):
        folder.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged_solver\nVersion: 1.0\n")
    for name, text in (("__init__", ""), ("base", PACKAGED), ("mine", DERIVED)):
        (package / f"{name}.py").write_text(text)
    run = f"""
from formulations.generators.random_instances import layered_problem
from packaged_solver.mine import Mine
from solvers.compare import compare
from solvers.composites.multi_start import MultiStart
solver = MultiStart(Mine, starts=1) if {wrapped} else Mine()
made = []
compared = compare(layered_problem(4), [solver], journal="runs.jsonl", on_run=lambda label, _: made.append(label))
print(len(made), compared.solutions[solver.label][0].details["versions"]["packaged_solver.mine"])
"""

    def told():
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        made = subprocess.run(
            [sys.executable, "-c", run], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return made.stdout

    first, again = told(), told()
    assert first.startswith("1 1.0 sha256:")
    assert again.startswith("0 ")
    with (package / f"{edited}.py").open("a") as file:
        file.write("# edited\n")
    assert told().startswith("1 ")
