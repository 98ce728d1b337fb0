"""``qcompress leap``: from a problem file to a solution file through the service, and what it shows before."""

import json
import re

import pytest

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from solvers import Solution

pytest.importorskip("dwave.cloud")
from tests.leap.fixtures import HYBRID, REMOTE, configure
from tests.leap.server import TOKEN

PROBLEM = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})


@pytest.fixture
def run(leap, tmp_path, capsys):
    """Run a command in a folder with a problem file; gives exit code, stdout, stderr."""
    PROBLEM.save(tmp_path / "problem.npz")

    def command(*words):
        capsys.readouterr()
        code = main(["leap", *map(str, words)])
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return code, said.out, said.err

    return command


@pytest.mark.parametrize("solver", REMOTE)
def test_submit_status_fetch_list(run, leap, tmp_path, solver):
    leap.pending = 1
    code, out, err = run("submit", "problem.npz", "--solver", solver, "--time-limit", 10)
    assert code == 0
    assert ("expected charge 0.0238 s" if solver == "qpu" else "expected charge 10 s") in err
    job = tmp_path / out.strip()
    assert job.exists()
    assert "PENDING" in run("status", job)[1]
    assert "COMPLETED" in run("status", job)[1]
    code, out, _ = run("fetch", job)
    assert code == 0
    assert "polished" in out
    assert f"queue {4.98 if solver == 'qpu' else 2:.3f} s" in out
    assert bool(re.search(r"energies .* \|[ ▁▂▃▄▅▆▇█]{20}\| ", out)) == (solver != "leap-nl")
    if solver == "qpu":
        assert re.search(r"2 variables on 2 qubits, longest chain 1, chain strength .*, chains broken 0", out)
        assert re.search(r"time to solution \S+ s .* \(queue 4.980 s and access 0.02 s apart\)", out)
    (written,) = tmp_path.glob("leap-jobs/*.solution.json")
    assert Solution.load(written).objective == 1.0
    listed = json.loads(run("list", "--json")[1])
    assert [(one["solver"], one["status"]) for one in listed] == [(solver, "COMPLETED")]
    assert len(leap.problems) == 1


def test_a_dry_run_shows_size_time_and_charge_and_sends_nothing(run, leap, tmp_path):
    code, out, _ = run("submit", "problem.npz", "--solver", "leap-cqm", "--time-limit", 30, "--dry-run", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["leap-cqm"]["sizes"]["variables"] == [4, 65536]
    assert shown["leap-cqm"]["charge_s"] == 30.0
    assert shown["leap-cqm"]["quota_s"] == 1.5
    assert shown["leap-nl"]["min_time_s"] == 5.0
    code, out, _ = run("submit", "problem.npz", "--solver", "leap-cqm", "--dry-run")
    assert code == 0
    assert "nothing was sent" in out
    assert "cheaper for this problem: leap-cqm" in out
    assert {method for method, _ in leap.requests} == {"GET"}
    assert not (tmp_path / "leap-jobs").exists()


@pytest.mark.parametrize("solver", ["qpu", "qpu-decomposed"])
def test_a_dry_run_of_a_mock_needs_neither_token_nor_network(run, leap, tmp_path, monkeypatch, solver):
    configure(monkeypatch, tmp_path, leap.endpoint, token="")
    words = ("--option", "simulated=true", "--option", "topology=zephyr", "--dry-run", "--json")
    code, out, err = run("submit", "problem.npz", "--solver", solver, *words)
    assert code == 0, err
    shown = json.loads(out)[solver]
    assert shown["sizes"]["qubits"][0] > 0
    assert (shown["charge_s"], shown["quota_s"], shown["refusal"]) == (0.0, 0.0, "")
    assert not leap.requests


WITHOUT_AN_ANSWER = {
    "no token": "no D-Wave API token",
    "bad token": "does not accept the API token",
    "no network": "no connection to the service at http",
    "a broken service": "failed (503",
}
SIZES = {
    "leap-cqm": {"variables": [4, None], "constraints": [3, None], "biases": [12, None]},
    "leap-nl": None,
    "leap-bqm": None,
    "qpu": {"variables": [2, None], "couplings": [0, None]},
    "qpu-decomposed": {"groups": [2, None], "options": [4, None], "calls": [20, None]},
}


@pytest.mark.parametrize("fault", WITHOUT_AN_ANSWER)
@pytest.mark.parametrize("solver", SIZES)
def test_a_dry_run_without_an_answer_of_the_service_shows_the_rest(run, leap, tmp_path, monkeypatch, solver, fault):
    if "token" in fault:
        configure(monkeypatch, tmp_path, leap.endpoint, token="bad" if fault == "bad token" else "")
    if fault == "no network":
        leap.drop_at, leap.drop_on = 0, True
    if fault == "a broken service":
        leap.errors["GET", ""] = (503, "closed")
    words = ("submit", "problem.npz", "--solver", solver, "--time-limit", 30, "--dry-run")
    code, out, err = run(*words)
    assert code == 0, err
    assert err == ""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{solver}: only the service knows ")]
    assert WITHOUT_AN_ANSWER[fault] in line
    assert ("the minimum time limit" in line) == ("qpu" not in solver)
    assert "nothing was sent" in out
    assert "cheaper" not in out
    assert ("qpu: coefficients span" in out) == (solver == "qpu")
    shown = json.loads(run(*words, "--json")[1])
    assert set(shown) == ({"leap-cqm", "leap-nl"} if solver in ("leap-cqm", "leap-nl") else {solver})
    shown = shown[solver]
    assert shown["sizes"] == (SIZES[solver] or shown["sizes"])
    assert all(size > 0 and limit is None for size, limit in shown["sizes"].values()) or solver == "qpu"
    assert (shown["min_time_s"], shown["quota_s"], shown["refusal"]) == (None, None, "")
    assert shown["charge_s"] == (None if "qpu" in solver else 30.0)
    assert WITHOUT_AN_ANSWER[fault] in shown["not_looked_up"]
    assert {method for method, _ in leap.requests} <= {"GET"}
    assert not (tmp_path / "leap-jobs").exists()


def test_a_dry_run_for_a_solver_that_the_account_lacks_shows_the_size_and_fails(run):
    words = ("submit", "problem.npz", "--solver", "leap-cqm", "--option", "remote=nonesuch", "--dry-run")
    code, out, err = run(*words)
    assert code == 1
    assert "no solver 'nonesuch' that is online; it has: " in err
    assert "variables 4" in out


def test_a_dry_run_shows_the_sizes_that_the_service_is_asked_about(run, leap, tmp_path, monkeypatch):
    words = ("submit", "problem.npz", "--dry-run", "--json", "--solver")
    asked = {solver: json.loads(run(*words, solver)[1])[solver]["sizes"] for solver in HYBRID}
    configure(monkeypatch, tmp_path, leap.endpoint, token="")
    for solver in HYBRID:
        sizes = json.loads(run(*words, solver)[1])[solver]["sizes"]
        assert {name: size for name, (size, _) in sizes.items()} == {n: size for n, (size, _) in asked[solver].items()}


def test_a_mock_has_no_jobs_and_says_what_runs_it(run, leap):
    code, _, err = run("submit", "problem.npz", "--solver", "qpu", "--option", "simulated=true")
    assert code == 1
    assert "'qcompress solve'" in err
    assert not leap.requests


def test_a_dry_run_for_a_processor_says_what_its_precision_would_lose(run, leap):
    code, out, _ = run("submit", "problem.npz", "--solver", "qpu", "--dry-run")
    assert code == 0
    assert "qpu: coefficients span" in out
    assert "at 5 bits of precision 0% of the 0 couplings are lost" in out
    shown = json.loads(run("submit", "problem.npz", "--solver", "qpu", "--dry-run", "--json")[1])
    assert shown["qpu"]["coefficients"]["variables"] == 2
    assert (
        json.loads(run("submit", "problem.npz", "--solver", "leap-bqm", "--dry-run", "--json")[1])["leap-bqm"][
            "coefficients"
        ]
        is None
    )


def test_the_nonlinear_form_is_the_cheaper_one_for_a_dense_factor(run, leap, tmp_path):
    layered_problem(150, rank=8).save(tmp_path / "dense.npz")
    leap.solvers["hybrid_cqm_solver"]["properties"]["num_biases_multiplier"] = 4.65e-05
    shown = json.loads(run("submit", "dense.npz", "--solver", "leap-cqm", "--dry-run", "--json")[1])
    assert shown["leap-cqm"]["sizes"]["biases"][0] == 2 * 900 + 900 + (900**2 - 150 * 36) // 2
    assert shown["leap-cqm"]["min_time_s"] > shown["leap-nl"]["min_time_s"]
    said = run("submit", "dense.npz", "--solver", "leap-cqm", "--dry-run")[1]
    assert "cheaper for this problem: leap-nl (leap-cqm: 405,000 biases, 18.9 s; leap-nl: 10," in said


def test_a_dry_run_of_what_does_not_fit_fails_and_says_why(run, leap):
    code, _, err = run("submit", "problem.npz", "--solver", "leap-cqm", "--time-limit", 0.1, "--dry-run")
    assert code == 1
    assert "it needs at least 1 s" in err


def test_a_dry_run_of_parts_says_what_they_cost_at_most(run, leap):
    words = ("submit", "problem.npz", "--solver", "qpu-decomposed", "--option", "calls=3", "--dry-run", "--json")
    code, out, _ = run(*words)
    assert code == 0
    shown = json.loads(out)["qpu-decomposed"]
    assert shown["charge_s"] == pytest.approx(3 * shown["time_limit_s"])
    assert run(*words[:-2])[0] == 2
    assert {method for method, _ in leap.requests} == {"GET"}


def test_solvers_lists_what_the_account_has(run):
    code, out, _ = run("solvers")
    assert code == 0
    assert "hybrid_cqm_solver" in out
    assert {"name", "takes", "kind", "online", "load"} == set(json.loads(run("solvers", "--json")[1])[0])


def test_a_solver_that_runs_here_cannot_be_submitted_to(run):
    code, _, err = run("submit", "problem.npz", "--solver", "anneal")
    assert code == 2
    assert "leap-cqm, leap-bqm, leap-nl, qpu" in err


def test_nothing_is_sent_unless_a_solver_is_named(run, leap):
    code, _, err = run("submit", "problem.npz")
    assert code == 2
    assert "--solver" in err
    assert not leap.requests


FAULTS = {
    "no token": "into the environment variable DWAVE_API_TOKEN, or run 'dwave config create'",
    "bad token": "does not accept the API token; copy it again from your Leap dashboard",
    "no such solver": "no solver 'nonesuch' that is online; it has: ",
    "no network": "nothing is lost: try again when the network is there",
    "quota exceeded": "check the quota in your Leap dashboard, or try later",
    "failed problem": "ended as FAILED (it stumbled); submit it again as a new job",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("solver", REMOTE)
def test_every_fault_is_one_line_that_says_what_to_do(run, leap, tmp_path, monkeypatch, solver, fault):
    words = ["submit", "problem.npz", "--solver", solver]
    if fault in ("no token", "bad token"):
        configure(monkeypatch, tmp_path, leap.endpoint, token="bad" if fault == "bad token" else "")
    if fault == "no such solver":
        words += ["--option", "remote=nonesuch"]
    if fault == "no network":
        leap.drop_at, leap.drop_on = 0, True
    if fault == "quota exceeded":
        leap.errors["POST", "problems/"] = (429, "too many")
    leap.outcome, leap.message = "FAILED" if fault == "failed problem" else "COMPLETED", "it stumbled"
    code, out, err = run(*words)
    if fault == "failed problem":
        code, _, err = run("fetch", tmp_path / out.strip())
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert FAULTS[fault] in err


def test_the_table_of_solvers_says_that_a_token_is_missing(leap, tmp_path, monkeypatch, capsys):
    configure(monkeypatch, tmp_path, leap.endpoint, token="")
    assert main(["solvers", "--json"]) == 0
    shown = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert "DWAVE_API_TOKEN" in shown["leap-cqm"]["why_not"]
    assert shown["anneal"]["available"]
    configure(monkeypatch, tmp_path, leap.endpoint)
    assert main(["solvers", "--json"]) == 0
    shown = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert shown["leap-cqm"]["available"]
    assert not leap.requests
