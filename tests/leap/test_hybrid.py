"""Leap's solvers through a service on this machine: right answers, nothing lost, nothing sent twice."""

import contextlib
import io
import itertools
import json
import traceback

import numpy as np
import pytest

from formulations import EncodingError, FileFormatError, Problem, file_kinds
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled
from solvers import InvalidOptionError, Status, UnsupportedProblemError, available, solve
from solvers.testing import optimum

pytest.importorskip("dwave.cloud")
import dimod

from solvers.leap import connection, job
from solvers.leap.errors import LeapConnectionError, LeapError
from solvers.leap.forms import CqmForm
from solvers.leap.job import Job, jobs_in
from tests.leap.fixtures import REMOTE
from tests.leap.server import TOKEN

PROBLEM = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})


def feasible_problems(count, **sizes):
    """Random problems that have a feasible choice, something to decide, and whose optimum is known."""
    drawn = (small_problem(seed, **sizes) for seed in itertools.count())
    judged = ((one, optimum(one)) for one in drawn if one.num_options > one.num_groups)
    return list(itertools.islice((pair for pair in judged if pair[1] is not None), count))


# --- right answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", REMOTE)
def test_the_optimum_of_random_problems(one_connection, leap, solver, count):
    problems = feasible_problems(count, max_groups=4, max_options=3)
    for problem, best in problems:
        solution = solve(problem, solver)
        assert solution.feasible
        assert solution.objective == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert len(leap.problems) == len(problems)


@pytest.mark.parametrize("solver", ["leap-cqm", "leap-nl"])
def test_the_service_alone_finds_the_optimum(one_connection, solver):
    """What the service loads from the upload is the problem itself: its best sample needs no repair and no polish."""
    for problem, best in feasible_problems(25, max_groups=4, max_options=3):
        details = solve(problem, solver).details
        assert details["objective_raw"] == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_the_cqm_that_was_uploaded_is_the_problem(leap):
    """Objective, up to the scale that solvers get, and feasibility equal `Problem.evaluate` on random choices."""
    problem = layered_problem(12, rank=3, seed=1)
    stated = scaled(problem).problem
    solve(problem, "leap-cqm")
    (upload,) = leap.uploads.values()
    cqm = dimod.ConstrainedQuadraticModel.from_file(io.BytesIO(upload["whole"]))
    rng = np.random.default_rng(0)
    for choice in rng.integers(0, 6, size=(40, problem.num_groups)):
        sample = dict.fromkeys(range(problem.num_options), 0) | dict.fromkeys(stated.flat(choice).tolist(), 1)
        assert cqm.objective.energy(sample) == pytest.approx(stated.evaluate(choice).objective, rel=1e-9)
        assert cqm.check_feasible(sample) == problem.evaluate(choice).feasible


def test_the_nonlinear_model_that_was_uploaded_is_the_problem(leap):
    from dwave.optimization import Model

    problem = layered_problem(12, rank=3, seed=1)
    stated = scaled(problem).problem
    solve(problem, "leap-nl")
    (upload,) = leap.uploads.values()
    model = Model.from_file(io.BytesIO(upload["whole"]))
    (decision,) = model.iter_decisions()
    choices = np.random.default_rng(0).integers(0, 6, size=(40, problem.num_groups))
    with model.lock():
        model.states.resize(len(choices))
        for at, choice in enumerate(choices):
            decision.set_state(at, choice)
            judged = stated.evaluate(choice)
            assert float(model.objective.state(at)) == pytest.approx(judged.objective, rel=1e-9)
            assert model.feasible(at) == judged.feasible


def test_a_request_that_is_still_on_its_way_is_waited_for(leap, monkeypatch):
    """The connection broke while the problem was sent, and the service does not know it at once."""
    known, asked = leap.list_problems, []

    def late(query, **_):
        asked.append(query)
        return (200, "problems", []) if len(asked) == 1 else known(query)

    monkeypatch.setattr(leap, "list_problems", late)
    leap.drop_at, leap.drop_on, leap.drop_after = 7, True, True
    with pytest.raises(LeapConnectionError):
        solve(PROBLEM, "leap-cqm", wait=False)
    assert leap.requests[7] == ("POST", "problems/")
    leap.restart()
    (one,) = jobs_in("leap-jobs")
    assert one.fetch().objective == 1.0
    assert len(leap.problems) == 1


def test_the_answer_says_where_the_time_went_and_what_the_samples_were_worth(leap):
    solution = solve(PROBLEM, "leap-bqm", time_limit=5)
    assert solution.status is Status.FEASIBLE
    assert solution.bound is None
    assert {name: solution.timing[name] for name in ("solve_s", "queue_s", "qpu_s", "charge_s")} == pytest.approx(
        {"solve_s": 3.0, "queue_s": 2.0, "qpu_s": 0.02, "charge_s": 3.0}
    )
    assert {"objective_raw", "objective_decoded", "objective_repaired", "objective_polished"} <= set(solution.details)
    assert solution.details["problem_id"] in leap.problems


def test_the_time_limit_is_the_services(leap):
    solve(PROBLEM, "leap-cqm", time_limit=7.5)
    (sent,) = leap.problems.values()
    assert sent["params"] == {"time_limit": 7.5}


def test_a_problem_with_nothing_to_decide_is_not_sent(leap):
    solution = solve(Problem(["a"], [["keep"]], [2.0], {"bytes": [3]}, {"bytes": 3}), "leap-cqm")
    assert solution.status is Status.OPTIMAL
    assert not leap.requests


def test_budgets_with_fractions_are_priced_in_the_bqm_and_the_job_says_so(leap):
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 3, 0, 1], {"s": [0.8, 0.45, 0.8, 0.4]}, {"s": 1.25})
    solution = solve(problem, "leap-bqm")
    assert solution.details["record"]["prices"]["s"] > 0
    assert solution.objective == optimum(problem)


# --- before anything is sent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_sizes_are_those_of_the_built_model(seed):
    from formulations import to_cqm

    problem = small_problem(seed)
    cqm = to_cqm(problem).cqm
    wanted = {"variables": len(cqm.variables), "constraints": len(cqm.constraints), "biases": cqm.num_biases()}
    assert CqmForm(problem, {}).sizes() == wanted


@pytest.mark.parametrize(
    ("solver", "sampler", "question"),
    [
        ("leap-cqm", "LeapHybridCQMSampler", "min_time_limit"),
        ("leap-bqm", "LeapHybridSampler", "min_time_limit"),
        ("leap-nl", "StrideHybridSolver", "estimated_min_time_limit"),
    ],
)
def test_the_least_time_is_what_d_waves_own_samplers_say(leap, solver, sampler, question):
    import dwave.system

    from solvers.registry import solver_class

    problem = layered_problem(300, rank=0, degree=4)
    for description in leap.solvers.values():  # so that the sizes matter
        description["properties"] |= {"num_variables_multiplier": 0.01, "num_nodes_multiplier": 1.0}
    with connection.connect() as line:
        form, guess = solver_class(solver)().stated(scaled(problem).problem, line, None)
    with getattr(dwave.system, sampler)() as theirs:
        model = form.encoded.model if solver == "leap-nl" else None
        if solver == "leap-bqm":
            model = form.encoded.bqm
        if solver == "leap-cqm":
            from formulations import to_cqm

            model = to_cqm(problem).cqm
        assert guess.min_time_s == pytest.approx(getattr(theirs, question)(model), rel=1e-9)
    assert guess.min_time_s > 1.5


@pytest.mark.parametrize(
    ("solver", "limit"),
    [
        ("leap-cqm", "maximum_number_of_biases"),
        ("leap-cqm", "maximum_number_of_constraints"),
        ("leap-bqm", "maximum_number_of_variables"),
        ("leap-nl", "maximum_state_size"),
    ],
)
def test_a_problem_above_a_limit_is_refused_before_anything_is_sent(leap, solver, limit):
    for description in leap.solvers.values():
        if limit in description["properties"]:
            description["properties"][limit] = 2
    with pytest.raises(UnsupportedProblemError, match="takes 2"):
        solve(layered_problem(3), solver)
    assert not leap.uploads
    assert not leap.problems
    assert not jobs_in("leap-jobs")


def test_too_short_a_time_limit_is_refused_with_the_least_that_works(leap):
    with pytest.raises(UnsupportedProblemError, match="0.5 s, it needs at least 1 s"):
        solve(PROBLEM, "leap-cqm", time_limit=0.5)
    with pytest.raises(UnsupportedProblemError, match="at most 3600 s"):
        solve(PROBLEM, "leap-cqm", time_limit=4000)
    assert not leap.uploads


# --- nothing is lost, nothing is sent twice --------------------------------------------------------------------------


def finished(solver, tries=5):
    """The solution of the one job there is, or of a new one if none was begun; goes on until the network lets it."""
    for _ in range(tries):
        with contextlib.suppress(LeapConnectionError):
            jobs = jobs_in("leap-jobs")
            return (jobs[0] if jobs else solve(PROBLEM, solver, wait=False)).fetch()
    raise AssertionError("never came to an end")


FAULTS = ("request lost", "answer lost", "network gone", "answer lost and network gone")


def usual(solver, fault):
    """Whether it is tried at every run of the tests: all faults of one back end, the worst fault of all."""
    return solver == "leap-cqm" or fault == FAULTS[-1]


@pytest.mark.parametrize(
    ("solver", "fault"),
    [
        pytest.param(solver, fault, marks=() if usual(solver, fault) else pytest.mark.slow)
        for solver in REMOTE
        for fault in FAULTS
    ],
)
def test_a_connection_dropped_at_any_request_submits_exactly_one_problem(leap, tmp_path, monkeypatch, solver, fault):
    solve(PROBLEM, solver, wait=False).fetch()
    total = len(leap.requests)
    assert total == {"qpu": 5, "leap-nl": 11}.get(solver, 10)  # solver (2), upload (5), submission, status, answer
    for k in range(total):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        leap.problems.clear()
        leap.requests.clear()
        leap.drop_at, leap.drop_on, leap.drop_after = k, "gone" in fault, "answer" in fault
        with contextlib.suppress(LeapConnectionError):
            solve(PROBLEM, solver, wait=False).fetch()
        assert len(leap.requests) > k, "the fault was never met"
        leap.restart()
        assert finished(solver).objective == 1.0
        assert len(leap.problems) == 1, f"dropped at request {k}"
        assert len(jobs_in("leap-jobs")) == 1


class Killed(BaseException):
    """Ends the process, as far as the program can tell."""


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_a_process_killed_at_any_write_of_its_job_file_loses_nothing(leap, tmp_path, monkeypatch, written):
    write = file_kinds.write_json
    solve(PROBLEM, "leap-cqm", wait=False)
    for k in range(4):
        folder = tmp_path / f"{k}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        leap.problems.clear()
        count = itertools.count()

        def dying(path, value, k=k, count=count):
            dies = next(count) == k
            if written or not dies:
                write(path, value)
            if dies:
                raise Killed

        monkeypatch.setattr(file_kinds, "write_json", dying)
        with pytest.raises(Killed):
            solve(PROBLEM, "leap-cqm", wait=False)
        monkeypatch.setattr(file_kinds, "write_json", write)
        assert finished("leap-cqm").objective == 1.0
        assert len(leap.problems) == 1, f"killed at write {k}"


def test_two_processes_that_go_on_with_one_job_submit_it_once(leap):
    """`send` takes the job from its file under a lock, whatever state the caller holds."""
    stale = begun(leap)
    with connection.connect() as line:
        first = job.send(stale, line)
        assert job.send(stale, line).problem_id == first.problem_id
    assert len(leap.problems) == 1


def begun(leap):
    """A job whose connection broke before its problem was uploaded."""
    leap.errors["POST", "bqm/multipart"] = (500, "no")
    with pytest.raises(LeapError):
        solve(PROBLEM, "leap-cqm", wait=False)
    leap.errors.clear()
    (one,) = jobs_in("leap-jobs")
    assert one.status == job.NOT_SENT
    return one


def test_a_job_is_fetched_from_its_file_alone_and_knows_its_state(leap):
    leap.pending = 2
    made = solve(PROBLEM, "leap-nl", wait=False)
    again = Job.load(made.path)
    assert again.refresh().status == "PENDING"
    heard = []
    solution = again.fetch(on_wait=lambda now: heard.append(now.status))
    assert heard == ["PENDING"]
    assert solution.objective == 1.0
    assert solution.problem_fingerprint == PROBLEM.fingerprint()
    assert Job.load(made.path).status == "COMPLETED"
    assert again.fetch().objective == 1.0
    assert len(leap.problems) == 1


def test_refresh_of_a_job_that_was_never_sent_sends_nothing(leap):
    assert begun(leap).refresh().status == job.NOT_SENT
    assert not leap.problems


def test_jobs_are_interrupted_without_harm(leap):
    leap.pending = 10**6

    def interrupt(_):
        raise KeyboardInterrupt

    solution = solve(PROBLEM, "leap-cqm", initial=[1, 1], on_progress=interrupt)
    assert solution.stop_reason == "INTERRUPTED"
    solution = solve(PROBLEM, "leap-cqm", on_progress=interrupt)
    leap.pending = 0
    assert Job.load(solution.details["job"]).fetch().objective == 1.0


def test_a_damaged_job_file_and_a_changed_problem_are_refused(leap):
    made = solve(PROBLEM, "leap-cqm", wait=False)
    layered_problem(2).save(next(made.path.parent.glob("problem-*.npz")))
    with pytest.raises(FileFormatError, match="does not hold the problem"):
        made.fetch()
    made.path.write_text(made.path.read_text()[:40])
    with pytest.raises(FileFormatError, match="no readable JSON"):
        Job.load(made.path)
    made.path.write_text(json.dumps(job.FILE_KIND.header))
    with pytest.raises(FileFormatError, match="not a complete"):
        Job.load(made.path)


# --- what never happens ----------------------------------------------------------------------------------------------


def saying(error):
    """All that can be read off an error, its causes and tracebacks included."""
    return repr(error) + "".join(traceback.format_exception(error))


@pytest.mark.parametrize("solver", [*REMOTE, "qpu-decomposed"])
def test_no_token_is_stored_or_shown(leap, tmp_path, capfd, caplog, solver):
    """Neither the good one nor one that is refused: in no file, no output, no log at any level, no error."""
    from solvers.registry import solver_class

    caplog.set_level(0)
    config = {"token": TOKEN, "endpoint": leap.endpoint}
    back_end = solver_class(solver)(config=config)
    solution = solve(PROBLEM, back_end)
    solution.save(tmp_path / "solution.json")
    texts = [repr(solution), repr(back_end)]
    for fault in FAULTS[1:]:
        leap.drop_at, leap.drop_on, leap.drop_after = len(leap.requests) + 3, "gone" in fault, "answer" in fault
        try:
            texts.append(repr(solve(PROBLEM, back_end)))
        except LeapError as error:
            texts.append(saying(error))
        leap.restart()
    for status, message in ((500, "no"), (401, "no"), (403, "no"), (429, "no"), (400, "no")):
        leap.errors["POST", "problems/"] = (status, message)
        with pytest.raises(LeapError) as caught:
            solve(PROBLEM, back_end, seed=status)  # a seed of its own: a descent would go on with what was sent
        texts.append(saying(caught.value))
    with pytest.raises(LeapError) as caught:
        solve(PROBLEM, solver_class(solver)(config=config | {"token": f"bad-{TOKEN}"}))
    texts.append(saying(caught.value))
    (tmp_path / "dwave.conf").unlink()  # that one holds it
    said = capfd.readouterr()
    texts += [said.out, said.err, caplog.text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    texts += [path.read_bytes().decode(errors="replace") for path in files]
    assert not [text for text in texts if TOKEN in text]


def test_auto_and_comparisons_leave_the_network_alone(leap):
    assert solve(PROBLEM).status is Status.OPTIMAL
    assert solve(PROBLEM, "portfolio", time_limit=5).feasible
    assert not leap.requests
    assert {info.name for info in available() if info.needs_network} >= {*REMOTE, "qpu-decomposed"}


def test_only_leap_solvers_make_jobs():
    with pytest.raises(InvalidOptionError, match="wait=False is only for the leap solvers"):
        solve(PROBLEM, "greedy", wait=False)
    with pytest.raises(InvalidOptionError, match="takes no initial"):
        solve(PROBLEM, "leap-cqm", wait=False, initial=[0, 1])


def test_unknown_encodings_are_refused():
    with pytest.raises(InvalidOptionError, match="one-hot, domain-wall"):
        solve(PROBLEM, "leap-bqm", encoding="morse")


def test_a_model_of_too_many_pairs_is_refused(leap, monkeypatch):
    monkeypatch.setattr("formulations.forms.couplings.MAX_PAIRS", 10)
    with pytest.raises(EncodingError, match="more than 10"):
        solve(layered_problem(5), "leap-bqm")
    assert not leap.uploads
