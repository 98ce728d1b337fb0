"""Several solvers at once: what they share, how they end, and that nothing of them is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from formulations.generators.random_instances import layered_problem
from solvers import InvalidOptionError, Solver, SolverError, Status, StopReason, UnsupportedProblemError, solve
from solvers.composites.portfolio import Portfolio

PROBLEM = layered_problem(8, bits=(2, 4, 8), rank=2, seed=3)
PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="signals and process groups")


@dataclass(frozen=True)
class Offers(Solver):
    """Offers one choice and ends."""

    name = "offers"
    summary = "offers the smallest options"

    def run(self, problem, search):
        search.offer(np.zeros(problem.num_groups, dtype=int))


@dataclass(frozen=True)
class Listens(Solver):
    """Finds nothing by itself; ends when it has heard of a choice and of a bound."""

    name = "listens"
    summary = "waits for the others"

    def run(self, problem, search):
        while not search.expired() and (search.choice is None or search.bound is None):
            time.sleep(0.01)
        search.details |= {"heard": search.choice.tolist(), "bound": search.bound}


@dataclass(frozen=True)
class Bounds(Solver):
    """Proves a bound and ends."""

    name = "bounds"
    summary = "a bound"

    def run(self, problem, search):
        search.raise_bound(-123.0)


@dataclass(frozen=True)
class Fails(Solver):
    name = "fails"
    summary = "raises"

    def run(self, problem, search):
        raise ZeroDivisionError("on purpose")


@dataclass(frozen=True)
class Dies(Solver):
    name = "dies"
    summary = "takes its process down"

    def run(self, problem, search):
        os._exit(7)


@dataclass(frozen=True)
class Stubborn(Solver):
    """A solver that cannot be interrupted, like compiled code, and runs in its own process."""

    name = "stubborn"
    summary = "looks at no clock and no signal"
    note: str = ""

    def run(self, problem, search):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(self.note).write_text(f"{os.getpid()} {child.pid}")
        search.offer(np.zeros(problem.num_groups, dtype=int))
        time.sleep(600)


def alive(pid):
    """Whether a process runs (one that has ended but was not yet collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def outcomes(solution):
    return {lane["solver"]: lane["outcome"] for lane in solution.details["lanes"]}


def test_the_first_proof_ends_all():
    solution = solve(PROBLEM, Portfolio(solvers=("brute-force", Listens())), seed=0, time_limit=60)
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(solve(PROBLEM, "brute-force").objective)
    assert outcomes(solution)["listens"] == "ended by the first proof"


def test_lanes_hear_of_the_best_choice_and_bound_of_all(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    problem = layered_problem(20, seed=1)
    solution = solve(problem, Portfolio(solvers=(Listens(), Offers(), Bounds())), seed=0, time_limit=60)
    assert set(outcomes(solution).values()) == {"done"}
    told = next(lane["details"] for lane in solution.details["lanes"] if lane["solver"] == "listens")
    assert told["heard"] == solution.choice.tolist()
    assert told["bound"] == -123.0
    assert solution.stop_reason is StopReason.COMPLETED


def test_choices_larger_than_a_pipe_holds_are_passed_on():
    problem = layered_problem(40_000, rank=0, seed=1)
    solution = solve(problem, Portfolio(solvers=(Offers(), Bounds(), Listens())), seed=0, time_limit=60)
    assert set(outcomes(solution).values()) == {"done"}


def test_with_one_core_solvers_run_one_after_the_other(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    solution = solve(layered_problem(20), Portfolio(solvers=(Bounds(), Offers(), Listens())), seed=0)
    assert outcomes(solution) == {"bounds": "done", "offers": "done", "listens": "done"}


def test_one_that_fails_or_dies_leaves_the_others_running():
    solution = solve(PROBLEM, Portfolio(solvers=(Fails(), Dies(), "greedy")), seed=0, presolve=False)
    assert solution.status is Status.FEASIBLE  # no proof ends the others before they fail
    told = outcomes(solution)
    assert told["fails"] == "failed: ZeroDivisionError: on purpose"
    assert told["dies"] == "failed: its process died (exit code 7)"


def test_all_failing_raises_with_every_reason():
    with pytest.raises(SolverError, match="every solver .* failed: ") as failed:
        solve(PROBLEM, Portfolio(solvers=(Fails(), Dies())), seed=0)
    assert "fails: ZeroDivisionError: on purpose" in str(failed.value)
    assert "dies: its process died (exit code 7)" in str(failed.value)


@PROC
def test_a_deaf_lane_is_ended_in_time_with_what_it_started(tmp_path):
    note = tmp_path / "pids"
    for time_limit in (1.0, 5.0, 25.0):  # a busy machine takes a while to start a process
        solution = solve(layered_problem(20), Portfolio(solvers=(Stubborn(str(note)),)), seed=0, time_limit=time_limit)
        if note.exists():
            break
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert outcomes(solution) == {"stubborn": "ended when time was up"}
    assert gone(map(int, note.read_text().split()))


# A shell without job control has what it starts in the background ignore SIGINT: the script listens again.
SCRIPT = """
import signal
import sys
from formulations.generators.random_instances import layered_problem
from solvers import solve
from solvers.composites.portfolio import Portfolio
from tests.composites.test_portfolio import Stubborn
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(solve(layered_problem(20), Portfolio(solvers=(Stubborn(sys.argv[1]),)), seed=0).stop_reason, flush=True)
"""


@PROC
@pytest.mark.parametrize("sent", ["SIGINT", "SIGKILL"])
def test_no_process_outlives_a_parent_that_is_interrupted_or_killed(sent, tmp_path):
    note, script = tmp_path / "pids", tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(note)], stdout=subprocess.PIPE, text=True, env=environment
    )
    while not (note.exists() and note.read_text().count(" ")):
        assert parent.poll() is None
        time.sleep(0.05)
    pids = [int(pid) for pid in note.read_text().split()]
    time.sleep(0.2)
    parent.send_signal(getattr(signal, sent))
    output, _ = parent.communicate(timeout=30)
    assert output.strip() == ("INTERRUPTED" if sent == "SIGINT" else "")
    assert gone(pids)


def test_a_script_without_the_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace('if __name__ == "__main__":', "if True:"))
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    run = subprocess.run([sys.executable, str(script), "x"], capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert "if __name__ == '__main__':" in run.stderr.splitlines()[-1]


def test_the_network_and_portfolios_in_portfolios_are_refused():
    with pytest.raises(InvalidOptionError, match="'leap-cqm' needs the network"):
        Portfolio(solvers=("anneal", "leap-cqm"))
    with pytest.raises(InvalidOptionError, match="cannot be part of a portfolio"):
        Portfolio(solvers=("portfolio",))
    with pytest.raises(UnsupportedProblemError, match="no solver of the portfolio can run: solver 'dp'"):
        solve(PROBLEM, "portfolio", solvers="dp")


def test_solvers_that_cannot_take_the_problem_are_named():
    solution = solve(PROBLEM, "portfolio", solvers="dp,brute-force")
    assert list(solution.details["refused"]) == ["dp"]
    assert solution.status is Status.OPTIMAL
