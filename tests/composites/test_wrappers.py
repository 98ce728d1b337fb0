"""Wrappers are solvers: they pass the suite, pickle, compare, and say what each part did; recordings replay exactly."""

import json
import pickle
from dataclasses import dataclass

import dimod
import numpy as np
import pytest

from formulations import FileFormatError
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import (
    InvalidOptionError,
    MultiStart,
    Polish,
    Recording,
    Replay,
    Solver,
    Status,
    StopReason,
    UnknownSolverError,
    UnsupportedProblemError,
    solve,
)
from solvers.compare.runs import compare
from solvers.heuristic.anneal import Anneal
from solvers.testing import check_solver

QUICK = Anneal(sweeps=50, population=2, generations=1)


def test_wrappers_pass_the_conformance_suite(tmp_path):
    for wrapper in (MultiStart("greedy", starts=2), Polish("greedy"), Recording("greedy", tmp_path / "runs.jsonl")):
        assert "check_same_seed_same_answer" in check_solver(wrapper)


def test_a_wrapper_has_the_abilities_of_what_it_holds():
    assert MultiStart("milp").exact
    assert not MultiStart("anneal").exact
    assert MultiStart("leap-cqm").needs_network
    assert not Polish(dimod.ExactSolver()).deterministic
    with pytest.raises(UnknownSolverError, match="nobody"):
        Polish("nobody")
    with pytest.raises(UnsupportedProblemError, match="'dp' takes no pair terms"):
        solve(layered_problem(3), MultiStart("dp"))


def test_wrappers_nest_and_are_compared_under_their_own_names():
    solvers = [MultiStart(QUICK, starts=2), Polish(MultiStart("greedy", starts=1)), MultiStart("greedy")]
    comparison = compare(layered_problem(8), solvers, seeds=(0, 1))
    names = {row.label for row in comparison.rows()}
    assert names == {
        "multi-start(anneal(sweeps=50, population=2, generations=1))(starts=2)",
        "polish(multi-start(greedy)(starts=1))",
        "multi-start(greedy)",
    }


def test_multi_start_keeps_the_best_of_independent_starts():
    problem = layered_problem(60)
    solution = solve(problem, MultiStart(QUICK, starts=5), seed=3)
    found = [start["objective"] for start in solution.details["starts"]]
    assert solution.objective == pytest.approx(min(found))
    assert len(set(found)) > 1  # the seeds differ
    assert len({start["seed"] for start in solution.details["starts"]}) == 5


def test_the_first_proof_ends_a_multi_start():
    solution = solve(layered_problem(30, rank=0), MultiStart("lagrangian", starts=50))
    assert solution.status is Status.OPTIMAL
    assert len(solution.details["starts"]) == 1


def test_a_time_limit_is_shared_and_named():
    solution = solve(layered_problem(200), MultiStart("anneal", starts=3), time_limit=3.0, seed=0)
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert len(solution.details["starts"]) == 3


def test_polish_reports_what_each_step_brought():
    problem = layered_problem(100)
    solution = solve(problem, Polish("greedy"), seed=0)
    objectives = [step["objective"] for step in solution.details["steps"]]
    assert [step["solver"] for step in solution.details["steps"]] == ["greedy", "anneal", "polish"]
    assert objectives[0] == pytest.approx(solve(problem, "greedy").objective)
    assert solution.objective == pytest.approx(min(objectives))
    assert solution.objective < 0.99 * objectives[0]


@pytest.mark.parametrize("inner", ["lagrangian", "milp", QUICK])
def test_a_replay_gives_the_recorded_course(inner, tmp_path):
    problem, path = layered_problem(12, rank=2, seed=1), tmp_path / "runs.jsonl"
    recorded = solve(problem, Recording(inner, path), seed=5)
    again = solve(problem, Replay(path))
    assert again.choice.tolist() == recorded.choice.tolist()
    assert (again.status, again.objective) == (recorded.status, recorded.objective)
    assert again.bound == pytest.approx(recorded.bound)
    course = [(p.objective, p.bound) for p in recorded.trace]
    assert [(p.objective, p.bound) for p in again.trace] == [pytest.approx(point) for point in course]
    times = [t for t, *_ in again.details["course"]]
    assert times == sorted(times)
    told = [p.t_s for p in recorded.trace]  # each is written right before it is told
    assert all(before <= t <= after for before, t, after in zip([0.0, *told[:-1]], times, told, strict=True))
    assert solve(problem, inner, seed=5).choice.tolist() == recorded.choice.tolist()


def test_infeasibility_is_replayed(tmp_path):
    problem, path = next(p for p in map(small_problem, range(200)) if proven_empty(p)), tmp_path / "runs.jsonl"
    solve(problem, Recording("brute-force", path))
    assert solve(problem, Replay(path)).status is Status.INFEASIBLE


def proven_empty(problem):
    try:
        return solve(problem, "brute-force").status is Status.INFEASIBLE
    except ValueError:  # each such budget is out of reach alone
        return False


def test_a_recording_holds_many_runs_and_replays_the_last_of_the_problem(tmp_path):
    path = tmp_path / "runs.jsonl"
    one, two = layered_problem(6, seed=1), layered_problem(7, seed=2)
    for problem, seed in ((one, 0), (two, 1), (one, 2), (two, 3)):
        solve(problem, Recording(QUICK, path), seed=seed)
    assert solve(one, Replay(path)).details["recorded"]["seed"] == 2
    with pytest.raises(UnsupportedProblemError, match="of 8 groups.*it has runs on: .* of 6 groups"):
        solve(layered_problem(8), Replay(path))


def test_a_line_that_was_cut_off_is_left_out_and_the_next_run_is_whole(tmp_path):
    problem, path = layered_problem(6), tmp_path / "runs.jsonl"
    solve(problem, Recording(QUICK, path), seed=0)
    whole = path.read_bytes()
    for cut in (1, 5, 30):
        path.write_bytes(whole[:-cut])
        assert solve(problem, Replay(path)).feasible
        solve(problem, Recording(QUICK, path), seed=9)
        assert solve(problem, Replay(path)).details["recorded"]["seed"] == 9
    for line in path.read_bytes().splitlines():
        assert line.startswith(b'{"run": "')


def test_a_file_of_another_kind_is_neither_read_nor_written(tmp_path):
    path = tmp_path / "problem.npz"
    problem = layered_problem(4)
    problem.save(path)
    before = path.read_bytes()
    for solver in (Recording(QUICK, path), Replay(path)):
        with pytest.raises(FileFormatError, match="not a qcompress recording file"):
            solve(problem, solver)
    assert path.read_bytes() == before
    newer = tmp_path / "newer.jsonl"
    newer.write_text(json.dumps({"run": "1", "kind": "qcompress recording", "version": 99}) + "\n")
    with pytest.raises(FileFormatError, match="version 99"):
        solve(problem, Replay(newer))


@dataclass(frozen=True)
class Fails(Solver):
    name = "fails"
    summary = "breaks after its first choice"

    def run(self, problem, search):
        search.offer(np.full(problem.num_groups, 0))
        raise RuntimeError("broken")


def test_what_was_found_before_a_failure_is_recorded(tmp_path):
    problem, path = layered_problem(4), tmp_path / "runs.jsonl"
    with pytest.raises(RuntimeError, match="broken"):
        solve(problem, Recording(Fails(), path))
    assert solve(problem, Replay(path)).choice.tolist() == [0] * 4


def test_paths_are_asked_for():
    for make in (Recording, Replay):
        with pytest.raises(InvalidOptionError, match="needs"):
            make()
    with pytest.raises(InvalidOptionError, match="starts"):
        MultiStart("sa", starts=0)


def test_pickled_wrappers_are_the_same(tmp_path):
    for wrapper in (MultiStart(QUICK), Polish("sa"), Recording("anneal", tmp_path / "x"), Replay(tmp_path / "x")):
        copy = pickle.loads(pickle.dumps(wrapper))
        assert (copy, copy.name, copy.exact) == (wrapper, wrapper.name, wrapper.exact)
