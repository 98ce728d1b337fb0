"""Quantum processors: embedding, chains, reads, and parts of problems that are too large; mock and service."""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from formulations import FileFormatError, Problem
from formulations.files import write_json
from formulations.forms.bqm import ENCODINGS
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled
from solvers import InvalidOptionError, UnsupportedProblemError, solve
from solvers.testing import check_solver, optimum

pytest.importorskip("dwave.cloud")
import dimod

from solvers.leap import descent_state, device, job
from solvers.leap.answer import time_to_solution
from solvers.leap.decomposed import Decomposed
from solvers.leap.device import Device
from solvers.leap.embedded import EmbeddedForm, access_time
from solvers.leap.errors import LeapConnectionError, LeapError, LeapProblemError
from solvers.leap.job import Job, jobs_in
from solvers.leap.qpu import QuantumProcessor
from tests.leap.fixtures import interrupted_at, pegasus

SPARSE = layered_problem(4, rank=0, degree=2, bits=(2, 4, 8), seed=2)


@pytest.fixture
def mock(tmp_path):
    """Options for a mock that keeps its files here."""
    return {"simulated": True, "jobs": str(tmp_path), "size": 3}


@pytest.mark.parametrize("seed", range(20))
def test_the_mock_gives_the_optimum_of_small_problems(mock, seed):
    problem = small_problem(seed, max_groups=3, max_options=3)
    best = optimum(problem)
    solution = solve(problem, "qpu", seed=0, **mock) if best is not None else None
    assert solution is None or solution.objective == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("solver", ["qpu", "qpu-decomposed"])
def test_every_encoding_runs_on_a_processor(mock, solver, encoding):
    for seed in range(6):
        problem = small_problem(seed, max_groups=3, max_options=5)
        if (best := optimum(problem)) is not None:
            solution = solve(problem, solver, encoding=encoding, seed=0, **mock)
            assert solution.objective == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_the_report_of_a_run(mock):
    details = solve(SPARSE, "qpu", seed=0, num_reads=50, **mock).details
    assert details["samples"] == 50
    assert details["variables"] == 8
    assert details["qubits"] >= details["variables"]
    assert 0.0 <= details["chain_breaks"] <= 1.0
    assert details["chain_strength"] > 0
    assert sum(details["energy_histogram"]["counts"]) == 50
    assert len(details["energy_histogram"]["edges"]) == 21
    assert {"share_valid", "share_feasible_raw", "objective_raw", "objective_polished", "share_best"} <= set(details)


@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_the_report_is_in_the_problems_unit(mock, factor):
    plain, scaled_up = (solve(one, "qpu", seed=0, **mock).details for one in (SPARSE, scaled(SPARSE, factor).problem))
    for name in ("chain_strength", "objective_raw", "objective_polished"):
        assert scaled_up[name] == pytest.approx(factor * plain[name])
    edges = [np.array(one["energy_histogram"]["edges"]) for one in (plain, scaled_up)]
    np.testing.assert_allclose(edges[1], factor * edges[0], rtol=1e-6)


def test_the_model_on_the_qubits_has_the_energies_of_the_model(tmp_path):
    """With whole chains; and every coupling lies on a coupler of the processor."""
    remote = type("Remote", (), {"name": "p", "properties": pegasus()["properties"]})
    problem = scaled(layered_problem(4, bits=(2, 4, 8), seed=2)).problem
    form = EmbeddedForm.first(problem, remote, {"encoding": "domain-wall", "jobs": str(tmp_path)})
    on_device = form.on_device(remote.properties)
    couplers = {frozenset(pair) for pair in remote.properties["couplers"]}
    assert all(frozenset(pair) in couplers for pair in on_device.quadratic)
    rng = np.random.default_rng(0)
    for spins in rng.choice([-1, 1], size=(10, form.source.num_variables)):
        whole = {qubit: int(spins[v]) for v, chain in form.chains.items() for qubit in chain}
        wanted = form.source.energy(dict(enumerate(spins.tolist())))
        assert on_device.energy(whole) == pytest.approx(wanted, abs=1e-6)
    assert max(len(chain) for chain in form.chains.values()) > 1


def test_a_sweep_runs_on_the_same_qubits(tmp_path, mock, monkeypatch):
    solve(SPARSE, "qpu", seed=0, **mock)
    monkeypatch.setattr(Device, "_found", lambda *_: pytest.fail("embedded anew"))
    assert solve(SPARSE.with_budgets(bytes=0.9 * SPARSE.budgets["bytes"]), "qpu", seed=0, **mock).feasible
    assert len(list(tmp_path.glob("embedding-*.json"))) == 1


def test_a_problem_that_does_not_fit_is_refused_with_the_size_that_does(tmp_path):
    with pytest.raises(UnsupportedProblemError, match="at most 10 fully coupled variables; .*'qpu-decomposed'"):
        solve(layered_problem(10), "qpu", simulated=True, size=2, jobs=str(tmp_path))


def test_nothing_is_searched_for_a_nearly_complete_model_far_beyond_the_largest_clique(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "find_embedding", lambda *_, **__: pytest.fail("searched"))
    dense = layered_problem(20)
    options = {"simulated": True, "size": 2, "jobs": str(tmp_path)}
    with pytest.raises(UnsupportedProblemError, match="at most 10 fully coupled variables"):
        solve(dense, "qpu", **options)
    with pytest.raises(UnsupportedProblemError, match="at most 10 fully coupled variables"):
        QuantumProcessor(**options).estimate(dense)


def test_the_search_for_an_embedding_gets_the_time_that_is_left(mock, monkeypatch, tmp_path):
    timeouts = []
    monkeypatch.setattr(device, "DENSE", 1.0)  # so that a search is needed; what it does not find fits as a clique
    monkeypatch.setattr(device, "find_embedding", lambda *_, timeout, **__: timeouts.append(timeout) or {})
    for limit in (7.0, None):
        for way in ("solve", "estimate"):
            options = mock | {"jobs": str(tmp_path / f"{way} {limit}")}
            if way == "solve":
                assert solve(SPARSE, "qpu", seed=0, time_limit=limit, **options).feasible
            else:
                assert not QuantumProcessor(**options).estimate(SPARSE, time_limit=limit).refusal
    limited, unlimited = timeouts[:2], timeouts[2:]
    assert max(limited) < 7.0
    assert min(unlimited) > 7.0


def test_a_part_on_the_mock_gets_the_time_that_is_left(mock, monkeypatch):
    left = []
    run = QuantumProcessor.run

    def record(self, problem, search):
        left.append(search.remaining())
        run(self, problem, search)

    monkeypatch.setattr(QuantumProcessor, "run", record)
    solve(SPARSE, "qpu-decomposed", seed=0, time_limit=60.0, calls=2, variables=4, **mock)
    assert len(left) == 2
    assert max(left) <= 60.0


EMBED_CLIQUES = """
import random, resource, sys, tempfile, warnings
from itertools import combinations
from pathlib import Path
import dimod
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from solvers.leap.device import Device
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import dwave.graphs
topology, missing = sys.argv[1], float(sys.argv[2])
shape = {"zephyr": [4, 4], "pegasus": [4], "chimera": [4, 4, 4]}[topology]
graph, rng = getattr(dwave.graphs, topology + "_graph")(*shape), random.Random(1)
graph.remove_nodes_from(rng.sample(sorted(graph), int(missing * len(graph))))
graph.remove_edges_from(rng.sample(sorted(graph.edges), int(missing * graph.number_of_edges())))
shown = {"topology": {"type": topology, "shape": shape}, "qubits": sorted(graph), "couplers": sorted(graph.edges)}
device, folder = Device("made", shown), Path(tempfile.mkdtemp())
for size in range(1, 13):
    pairs = list(combinations(range(size), 2))
    model = dimod.BinaryQuadraticModel(dict.fromkeys(range(size), 0), dict.fromkeys(pairs, 1), 0, "SPIN")
    chains = device.embed(model, folder)
    used = [qubit for chain in chains.values() for qubit in chain]
    assert len(chains) == size and len(used) == len(set(used)), size
    assert all(any(graph.has_edge(p, q) for p in chains[u] for q in chains[v]) for u, v in pairs), size
print(device.largest_clique())
"""


@pytest.mark.parametrize("missing", [0.0, 0.03])
@pytest.mark.parametrize(
    ("topology", "largest"),
    [("zephyr", 56), pytest.param("pegasus", 36, marks=pytest.mark.slow), ("chimera", 16)],
)
def test_all_small_cliques_are_embedded_within_a_memory_limit(topology, largest, missing):
    command = [sys.executable, "-c", EMBED_CLIQUES, topology, str(missing)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == largest if missing == 0.0 else 12 <= int(run.stdout) < largest


def test_parts_on_a_processor_of_the_zephyr_kind(tmp_path):
    problem = layered_problem(20, seed=3)
    solution = solve(
        problem, "qpu-decomposed", simulated=True, topology="zephyr", size=2, seed=0, calls=3, jobs=str(tmp_path)
    )
    assert solution.feasible
    assert solution.details["room"] > 12
    assert max(part["qubits"] for part in solution.details["parts"]) > solution.details["room"]


def test_through_the_service_on_a_processor_with_chains(leap):
    leap.solvers = {"pegasus": pegasus()}
    solution = solve(SPARSE, "qpu", num_reads=200)
    assert solution.objective == pytest.approx(optimum(SPARSE), rel=1e-9)
    assert solution.timing["qpu_s"] == pytest.approx(0.02)
    assert solution.timing["queue_s"] > 1.0
    assert solution.details["time_to_solution_s"] > 0
    (sent,) = leap.problems.values()
    assert sent["params"] == {"num_reads": 200}


def test_a_job_is_decoded_by_its_file_alone(leap):
    made = solve(SPARSE, "qpu", wait=False, num_reads=50)
    assert Job.load(made.path).fetch().objective == pytest.approx(optimum(SPARSE), rel=1e-9)
    assert json.loads(made.path.read_text())["charge_s"] == pytest.approx(made.charge_s)
    assert len(leap.problems) == 1


def test_reads_and_time_are_compared_with_the_processor_before_anything_is_sent(leap):
    with pytest.raises(UnsupportedProblemError, match="num_reads=20000, it takes 1 to 10000"):
        solve(SPARSE, "qpu", num_reads=20_000)
    with pytest.raises(UnsupportedProblemError, match="use fewer reads"):
        solve(SPARSE, "qpu", num_reads=1000, time_limit=0.01)
    assert not leap.problems


def test_the_charge_is_d_waves_own_estimate(leap):
    from solvers.leap.connection import connect

    with connect() as line:
        remote = line.solver("ising")
        form, guess = QuantumProcessor(num_reads=500).stated(scaled(SPARSE).problem, line, None)
        wanted = remote.estimate_qpu_access_time(num_qubits=form.sizes()["qubits"], num_reads=500) * 1e-6
        assert guess.charge_s == pytest.approx(wanted)
        assert access_time(form.sizes()["qubits"], remote, [{"num_reads": 1000}], None).charge_s > guess.charge_s


def test_parts_cost_at_most_what_the_estimate_says(leap):
    solver = Decomposed(calls=3, variables=4, num_reads=20)
    guess = solver.estimate(PARTED)
    assert not leap.problems
    solve(PARTED, solver, seed=0, initial=[0] * 4)
    charges = [one.charge_s for one in jobs_in("leap-jobs")]
    assert len(charges) == 3
    assert sum(charges) <= guess.charge_s <= 1.5 * sum(charges)


@pytest.mark.parametrize("solver", [QuantumProcessor, Decomposed])
def test_the_conformance_suite_on_the_mock(mock, solver):
    assert "check_answers_are_sound" in check_solver(solver(**mock))


def test_samples_stand_for_reads(tmp_path):
    """A state that was read five times counts five times."""
    remote = type("Remote", (), {"name": "p", "properties": pegasus(2)["properties"]})
    form = EmbeddedForm.first(scaled(SPARSE).problem, remote, {"encoding": "one-hot", "jobs": str(tmp_path)})
    qubits = sorted(form.on_device(remote.properties).variables)
    found = dimod.SampleSet.from_samples(
        (np.ones((1, len(qubits))), qubits), energy=[0.0], num_occurrences=[5], vartype="SPIN"
    )
    samples = form.unembedded([found], {})
    assert samples.choices.shape == (5, 4)
    assert not samples.valid.any()


def test_time_to_solution():
    assert time_to_solution(0.001, 0.5) == pytest.approx(0.001 * np.log(0.01) / np.log(0.5))
    assert time_to_solution(0.001, 1.0) == 0.001
    assert time_to_solution(0.001, 0.0) is None


def test_parts_of_a_problem_that_is_too_large(mock):
    """The start is bad on purpose: what is gained comes from the parts."""
    problem = layered_problem(20, seed=4)
    lowest = np.zeros(problem.num_groups, dtype=int)
    start = problem.evaluate(lowest).objective
    solution = solve(problem, "qpu-decomposed", seed=0, initial=lowest, **mock)
    best = solve(problem, "anneal", seed=0).objective
    assert solution.details["improved"] > 1
    assert solution.feasible
    assert solution.objective - best < 0.05 * (start - best)
    again = solve(problem, "qpu-decomposed", seed=0, initial=lowest, **mock)
    assert again.choice.tolist() == solution.choice.tolist()


def test_parts_stop_when_their_calls_are_used_up(mock):
    problem = layered_problem(20, seed=4)
    solution = solve(problem, "qpu-decomposed", seed=0, calls=2, initial=[0] * 20, **mock)
    assert solution.details["calls"] == 2


def test_parts_through_the_service(leap):
    solution = solve(layered_problem(6, bits=(2, 4, 8)), "qpu-decomposed", seed=0, variables=6, initial=[0] * 6)
    assert solution.details["improved"] >= 1
    assert len(leap.problems) == solution.details["calls"]


PARTED = layered_problem(4, bits=(2, 4, 8), seed=1)


def in_parts():
    """Two parts a pass, and one of the next pass, through the service."""
    return solve(PARTED, "qpu-decomposed", seed=0, variables=4, num_reads=20, initial=[0] * 4, calls=3)


def left_over():
    return list(Path("leap-jobs").glob("*.descent.json"))


@pytest.fixture
def undisturbed(leap, tmp_path, monkeypatch):
    """Choice and problems sent of a run that nothing disturbs; others begin in folders of their own."""
    solution = in_parts()
    assert not left_over()
    assert len(leap.problems) == solution.details["calls"] == 3
    return solution.choice.tolist(), len(leap.problems), len(leap.requests)


def afresh(leap, tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    leap.problems.clear()
    leap.requests.clear()
    leap.restart()


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True], ids=["request", "answer"])
def test_parts_go_on_where_the_connection_was_lost(leap, undisturbed, tmp_path, monkeypatch, after):
    choice, sent, requests = undisturbed
    for k in range(requests):
        afresh(leap, tmp_path, monkeypatch, f"{k}")
        leap.drop_at, leap.drop_on, leap.drop_after = k, True, after
        with contextlib.suppress(LeapConnectionError):
            in_parts()
        assert len(leap.requests) > k, "the fault was never met"
        leap.restart()
        solution = in_parts()
        assert solution.choice.tolist() == choice
        assert solution.details["calls"] == sent
        assert len(leap.problems) == sent, f"dropped at request {k}"
        assert not left_over()


class Killed(BaseException):
    """Ends the process, as far as the program can tell."""


@pytest.mark.parametrize("written", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before", "after"])
@pytest.mark.parametrize("module", [pytest.param(descent_state, marks=pytest.mark.slow), job], ids=["descent", "job"])
def test_parts_go_on_where_the_process_was_killed_at_a_write(leap, undisturbed, tmp_path, monkeypatch, module, written):
    """No part is sent twice and no better choice is lost, whichever of the files was being written."""
    choice, sent, _ = undisturbed
    for k in itertools.count():
        afresh(leap, tmp_path, monkeypatch, f"{k}")
        countdown = itertools.count(-k)

        def dying(path, value, countdown=countdown):
            dies = value.get("kind") == module.FILE_KIND.name and next(countdown) == 0
            if written or not dies:
                write_json(path, value)
            if dies:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr("formulations.file_kinds.write_json", dying)
            try:
                in_parts()
                break
            except Killed:
                pass
        solution = in_parts()
        assert solution.choice.tolist() == choice
        assert len(leap.problems) == sent, f"killed at write {k}"
    assert k > 2 * sent


def test_a_part_that_failed_is_sent_anew_by_the_next_call(leap, undisturbed, tmp_path, monkeypatch):
    choice, sent, _ = undisturbed
    afresh(leap, tmp_path, monkeypatch, "again")
    leap.outcome = "FAILED"
    with pytest.raises(LeapProblemError, match="ended as FAILED"):
        in_parts()
    leap.outcome = "COMPLETED"
    solution = in_parts()
    assert solution.details["resumed_at"] == 0
    assert solution.choice.tolist() == choice
    assert len(leap.problems) == sent + 1


def test_parts_that_are_interrupted_give_the_best_so_far_and_go_on_from_it(mock):
    problem = layered_problem(20, seed=4)
    whole = solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, **mock)
    cut = solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, on_progress=interrupted_at(3), **mock)
    assert cut.stop_reason == "INTERRUPTED"
    assert whole.objective < cut.objective < problem.evaluate([0] * 20).objective
    again = solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, **mock)
    assert again.details["resumed_at"] >= 1
    assert again.choice.tolist() == whole.choice.tolist()
    assert again.details["parts"] == whole.details["parts"]


def test_two_processes_do_not_share_a_descent(mock, tmp_path):
    problem = layered_problem(20, seed=4)
    solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, on_progress=interrupted_at(2), **mock)
    (left,) = tmp_path.glob("*.descent.json")
    program = "import fasteners as f, sys; x = f.InterProcessLock(sys.argv[1]); x.acquire(); print(1); sys.stdin.read()"
    command = [sys.executable, "-uc", program, str(left.with_suffix(".lock"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another:
        another.stdout.readline()
        with pytest.raises(LeapError, match="in use by another process"):
            solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, **mock)
        another.stdin.close()
    assert solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, **mock).feasible


def test_a_damaged_descent_is_refused(mock, tmp_path):
    problem = layered_problem(20, seed=4)
    solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, on_progress=interrupted_at(2), **mock)
    (left,) = tmp_path.glob("*.descent.json")
    left.write_text(json.dumps({"kind": "qcompress descent", "version": 1}))
    with pytest.raises(FileFormatError, match="delete it to start again"):
        solve(problem, "qpu-decomposed", seed=0, initial=[0] * 20, **mock)


def test_nothing_to_decide_in_parts(mock):
    solution = solve(Problem(["a"], [["keep"]], [2.0], {}, {}), "qpu-decomposed", **mock)
    assert solution.status == "OPTIMAL"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_reads": 0}, "at least 1"),
        ({"topology": "torus"}, "pegasus, zephyr"),
        ({"encoding": "x"}, "one-hot"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(InvalidOptionError, match=said):
        solve(SPARSE, "qpu", simulated=True, **options)


@pytest.mark.parametrize("option", ["calls", "variables"])
def test_no_calls_and_no_variables_are_refused(option):
    with pytest.raises(InvalidOptionError, match=f"option '{option}' .* at least 1, found 0"):
        solve(SPARSE, "qpu-decomposed", simulated=True, **{option: 0})


def test_what_has_no_jobs_says_so(mock):
    with pytest.raises(InvalidOptionError, match="runs locally and has no jobs"):
        solve(SPARSE, "qpu", wait=False, **mock)
    with pytest.raises(InvalidOptionError, match="many problems"):
        solve(SPARSE, "qpu-decomposed", wait=False, **mock)
