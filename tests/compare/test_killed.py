"""Comparisons that are killed, and processes that die: the table is that of an uncut run.

Equal is everything that no clock has a part in: the solvers here end by themselves, and times differ from run to run.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from formulations.generators.random_instances import layered_problem
from solvers import Solver
from solvers.compare.runs import compare
from solvers.processes import LOST, in_processes
from tests.compare.own_solvers import Dice
from tests.compare.test_parallel import cluster

ROOT = Path(__file__).parents[2]
PROBLEM = layered_problem(5, rank=2)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_comparison_killed_at_random_moments_and_resumed_is_the_uncut_one(tmp_path, kills):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/compare/killed_runs.py"), str(tmp_path), str(kills)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["lines"]) >= kills
    assert len(set(found["lines"])) > kills / 5  # kills came while runs were made
    assert found["resumed"] == found["whole"]


def halved(path_and_number):
    """Half of the number; the process dies at a 3 until the file is there, and at a 7 always."""
    flag, number = path_and_number
    if number == 7 or (number == 3 and not flag.exists()):
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number / 2


def test_a_process_that_dies_loses_nothing(tmp_path):
    pieces = [(tmp_path / "died", number) for number in range(5)]
    assert dict(in_processes(halved, pieces, 2)) == {number: number / 2 for number in range(5)}
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_a_piece_that_kills_every_process_is_told_apart_and_the_others_are_done(tmp_path):
    pieces = [(tmp_path / "died", number) for number in range(9)]
    found = dict(in_processes(halved, pieces, 2))
    assert found == {number: LOST if number == 7 else number / 2 for number in range(9)}


@dataclass(frozen=True)
class Deadly(Solver):
    """Kills its process at seed 1: the first time, or every time."""

    name = "deadly"
    summary = "kills its process"

    flag: str = ""
    always: bool = False

    def run(self, problem, search):
        if search.seed == 1 and (self.always or not Path(self.flag).exists()):
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        search.offer([0] * problem.num_groups)


@pytest.mark.slow
def test_a_solver_that_kills_its_process_is_a_row(tmp_path):
    comparison = compare(PROBLEM, [Deadly(flag=str(tmp_path / "died"), always=True), Dice()], seeds=(0, 1, 2), jobs=2)
    rows = {row.label.partition("(")[0]: row for row in comparison.rows()}
    assert rows["deadly"].statuses == {"FEASIBLE": 2, "ERROR": 1}
    assert rows["dice"].feasible_share == 1.0
    assert list(comparison.errors.values()) == ["the process of this run died in every attempt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_loses_a_worker_gives_the_uncut_table(tmp_path):
    joblib = pytest.importorskip("joblib")
    solvers, seeds = [Deadly(flag=str(tmp_path / "died")), Dice(), "anneal:sweeps=40", "greedy"], range(6)
    with cluster("dask"), joblib.parallel_config(backend="dask"):
        spread = compare(PROBLEM, solvers, seeds=seeds, jobs=2, journal=tmp_path / "runs.jsonl")
    assert (tmp_path / "died").exists()  # a worker was killed
    alone = compare(PROBLEM, solvers, seeds=seeds)
    for label, runs in alone.solutions.items():
        assert [run.choice.tolist() for run in spread.solutions[label]] == [run.choice.tolist() for run in runs]
    assert not spread.errors
