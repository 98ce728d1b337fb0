"""Whatever goes wrong with the Leap service is one clear error that says what to do."""

import socket

import pytest

from formulations import Problem
from solvers import SolverUnavailableError, solve
from solvers.testing import check_solver

pytest.importorskip("dwave.cloud")
from solvers.leap import connection
from solvers.leap.errors import (
    LeapConnectionError,
    LeapError,
    LeapProblemError,
    LeapQuotaError,
    LeapSolverError,
    LeapTokenError,
)
from solvers.leap.job import jobs_in
from tests.leap.fixtures import REMOTE, configure
from tests.leap.server import TOKEN

PROBLEM = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
SUBMIT = ("POST", "problems/")


def test_no_token(leap, tmp_path, monkeypatch):
    configure(monkeypatch, tmp_path, leap.endpoint, token="")
    with pytest.raises(LeapTokenError, match="DWAVE_API_TOKEN, or run 'dwave config create'"):
        solve(PROBLEM, "leap-cqm")
    assert not leap.requests
    assert "DWAVE_API_TOKEN" in connection.missing_token()


def test_the_token_may_come_from_the_environment_or_an_argument(leap, tmp_path, monkeypatch):
    configure(monkeypatch, tmp_path, leap.endpoint, token="")
    from solvers.leap.hybrid import LeapCqm

    assert solve(PROBLEM, LeapCqm(config={"token": TOKEN})).feasible
    monkeypatch.setenv("DWAVE_API_TOKEN", TOKEN)
    assert solve(PROBLEM, "leap-cqm").feasible


def test_a_token_that_is_not_accepted(leap, tmp_path, monkeypatch):
    configure(monkeypatch, tmp_path, leap.endpoint, token="wrong-and-secret")  # noqa: S106
    with pytest.raises(LeapTokenError, match="does not accept the API token") as caught:
        solve(PROBLEM, "leap-cqm")
    assert "wrong-and-secret" not in str(caught.value)
    assert not leap.uploads


def test_a_configuration_that_cannot_be_read(leap, tmp_path):
    (tmp_path / "dwave.conf").write_text("no section\n")
    with pytest.raises(LeapError, match="cannot be configured"):
        solve(PROBLEM, "leap-cqm")


def test_no_such_solver_lists_those_there_are(leap):
    with pytest.raises(LeapSolverError, match=r"no solver 'nonesuch' .* hybrid_cqm_solver \(cqm\)"):
        solve(PROBLEM, "leap-cqm", remote="nonesuch")
    del leap.solvers["hybrid_nl_solver"]
    with pytest.raises(LeapSolverError, match="no solver for nl problems"):
        solve(PROBLEM, "leap-nl")


def test_a_solver_for_other_problems(leap):
    with pytest.raises(LeapSolverError, match="takes bqm problems, not cqm"):
        solve(PROBLEM, "leap-cqm", remote="hybrid_bqm_solver")


def test_a_solver_that_is_configured_is_taken(leap, monkeypatch):
    from dwave.cloud.testing.mocks import hybrid_cqm_solver_data

    leap.solvers["older"] = hybrid_cqm_solver_data(name="older", avg_load=0.9)
    monkeypatch.setenv("DWAVE_API_SOLVER", "older")
    assert solve(PROBLEM, "leap-cqm").details["remote"] == "older"


def test_no_network(leap, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        configure(monkeypatch, tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/sapi/v2/")
    with pytest.raises(LeapConnectionError, match="no connection to the service at http://127.0.0.1"):
        solve(PROBLEM, "leap-cqm")


@pytest.mark.parametrize(
    ("status", "message", "error", "said"),
    [
        (429, "too many problems", LeapQuotaError, "takes no more problems now"),
        (400, "quota exhausted", LeapQuotaError, "quota in your Leap dashboard"),
        (500, "internal", LeapConnectionError, "failed"),
        (403, "not in your plan", LeapTokenError, "may not do this"),
        (400, "unknown parameter", LeapProblemError, "refused the request"),
    ],
)
@pytest.mark.parametrize("request_", [SUBMIT, ("POST", "bqm/multipart")], ids=["submission", "upload"])
def test_an_error_status_is_told_and_the_job_can_go_on(leap, status, message, error, said, request_):
    leap.errors[request_] = (status, message)
    with pytest.raises(error, match=said):
        solve(PROBLEM, "leap-cqm", wait=False)
    assert not leap.problems
    leap.errors.clear()
    (job,) = jobs_in("leap-jobs")
    assert job.fetch().objective == 1.0
    assert len(leap.problems) == 1


def test_a_refusal_of_one_problem_within_a_good_answer(leap, monkeypatch):
    refusal = {"error_code": 400, "error_msg": "time_limit is too small"}
    monkeypatch.setattr(leap, "accept", lambda job: refusal)
    with pytest.raises(LeapProblemError, match="time_limit is too small"):
        solve(PROBLEM, "leap-cqm")


@pytest.mark.parametrize("solver", REMOTE)
@pytest.mark.parametrize("outcome", ["FAILED", "CANCELLED"])
def test_a_problem_that_failed_or_was_cancelled(leap, solver, outcome):
    leap.outcome, leap.message = outcome, "the solver stumbled"
    with pytest.raises(LeapProblemError, match=f"ended as {outcome}") as caught:
        solve(PROBLEM, solver)
    assert ("stumbled" in str(caught.value)) == (outcome == "FAILED")
    (job,) = jobs_in("leap-jobs")
    assert job.status == outcome


@pytest.mark.parametrize("solver", REMOTE)
def test_a_slow_service_is_waited_for(leap, solver):
    leap.pending = 3
    assert solve(PROBLEM, solver).objective == 1.0


def test_an_answer_of_another_kind_is_told(leap, monkeypatch):
    monkeypatch.setattr(leap, "list_problems", lambda **_: (200, "something-else", []))
    with pytest.raises(LeapError, match="was not understood"):
        solve(PROBLEM, "leap-cqm")


@pytest.mark.parametrize("solver", REMOTE)
def test_a_problem_that_the_service_no_longer_knows(leap, solver):
    job = solve(PROBLEM, solver, wait=False)
    leap.problems.clear()
    for ask in (job.fetch, job.refresh):
        with pytest.raises(LeapProblemError, match=f"does not know problem {job.problem_id}.* submit it again"):
            ask()


@pytest.mark.parametrize("solver", REMOTE)
@pytest.mark.parametrize("answer", [{"format": "bq", "data": {"type": "?"}}, {"format": "qp"}, {"format": "?"}, None])
def test_an_answer_that_makes_no_sense_is_told_and_the_job_stays(leap, monkeypatch, solver, answer):
    job = solve(PROBLEM, solver, wait=False)
    with monkeypatch.context() as damaged:
        damaged.setattr(leap, "solved", lambda problem: answer)
        with pytest.raises(LeapError, match="was not understood") as caught:
            job.fetch()
        assert len(str(caught.value).splitlines()) == 1
    assert job.fetch().objective == 1.0
    assert len(leap.problems) == 1


def test_a_damaged_file_of_states_is_told(leap):
    job = solve(PROBLEM, "leap-nl", wait=False)
    leap.answers[job.problem_id] = b"nonsense"
    with pytest.raises(LeapError, match=r"was not understood \(Unknown file type.* fetch it again"):
        job.fetch()


def test_without_the_extra_the_solvers_say_what_to_install(monkeypatch):
    monkeypatch.setattr("solvers.leap.hybrid._installed", lambda name: False)
    with pytest.raises(SolverUnavailableError, match=r"pip install 'qcompress\[dwave\]'"):
        solve(PROBLEM, "leap-nl")
    from solvers import available

    info = next(info for info in available() if info.name == "leap-nl")
    assert not info.available
    assert "dwave-optimization" in info.why_not


@pytest.mark.parametrize("solver", REMOTE)
@pytest.mark.slow
def test_the_conformance_suite(leap, one_connection, solver):
    """On a service that takes the suite's short time limits."""
    quick = {"minimum_time_limit_s": 0.01, "minimum_time_limit": [[1, 0.01], [100_000, 0.01]], "min_time_limit": 0.01}
    for description in leap.solvers.values():
        description["properties"] |= quick
    assert "check_answers_are_sound" in check_solver(solver)
