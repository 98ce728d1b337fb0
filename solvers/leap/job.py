"""A job: one problem on its way to the service and back, in a file that outlives the process.

    begin ──▶ file written ──▶ uploaded ──▶ sending ──▶ submitted ──▶ done
                  ╰───────── `send` goes on from any of these ──────╯     ╰─▶ `fetch`

The file is written before anything goes out and after every step. A problem carries a label that no other has: when
a connection broke while the problem was being submitted, `send` looks the label up at the service and submits only
if it is not there. What always holds: one job, at most one problem; no token in the file.
"""

import dataclasses
import datetime
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fasteners

from formulations import FileFormatError, Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.reductions.scaling import normal_form
from solvers import registry
from solvers.base import Search, SubSearch
from solvers.errors import SolverError, UnsupportedProblemError
from solvers.leap.answer import take, time_to_solution, times
from solvers.leap.connection import Connection, connect
from solvers.leap.errors import LeapError, LeapProblemError
from solvers.leap.estimate import Estimate
from solvers.leap.forms import RemoteForm, Samples
from solvers.solution import Solution, StopReason

FILE_KIND = FileKind("qcompress leap job", version=1)
SUFFIX = ".job.json"

NOT_SENT = "NOT SENT"

FIRST_PAUSE_S, PAUSE_GROWTH, LONGEST_PAUSE_S = 0.01, 1.5, 10.0
"""Pauses between two questions whether a problem is done."""

SETTLE_S = 5.0
"""A request that was cut may still be on its way: so long it is waited for before the problem is sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One problem at the service; `begin` and `load` make it, every step gives a new one and writes the file.

    Attributes:
        path: the job file; the problem lies beside it.
        solver, options, time_limit_s: the back end, as it was asked.
        label: what the problem is called at the service.
        fingerprint: of the problem.
        record: how it was encoded (see `solvers.leap.forms`).
        created: UTC, ISO 8601.
        endpoint, remote: the service's address and solver.
        charge_s: expected charge, seconds of solver time.
        data_id: of the uploaded model, once it is there.
        sending: whether the problem may have gone out.
        problem_id: of the submitted problem, once it is known.
        status: as last heard: NOT SENT, PENDING, IN_PROGRESS, COMPLETED, FAILED or CANCELLED.
    """

    path: Path
    solver: str
    options: Mapping[str, Any]
    time_limit_s: float | None
    label: str
    fingerprint: str
    record: Mapping[str, Any]
    created: str
    endpoint: str
    remote: str
    charge_s: float
    data_id: str | None = None
    sending: bool = False
    problem_id: str | None = None
    status: str = NOT_SENT

    def save(self) -> None:
        """Write the file, whole or not at all."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "path"}
        FILE_KIND.write_json(self.path, value)

    @classmethod
    def load(cls, path: AnyPath) -> "Job":
        """Read a job file.

        Raises:
            FileFormatError: the file is of another kind, not whole, or of a newer version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            return cls(path=Path(path), **value)

    def problem(self) -> Problem:
        """The problem that was sent.

        Raises:
            FileFormatError: the file beside the job holds another problem.
        """
        path = _problem_file(self.path.parent, self.fingerprint)
        problem = Problem.load(path)
        if problem.fingerprint() != self.fingerprint:
            raise FileFormatError(f"{path} does not hold the problem of job {self.path}")
        return problem

    def form(self) -> RemoteForm:
        """The problem as it was encoded."""
        form: RemoteForm = _back_end(self.solver).form_class()(normal_form(self.problem()).problem, self.record)
        return form

    def refresh(self, config: Mapping[str, Any] | None = None) -> "Job":
        """Ask the service how the problem does; sends nothing. Writes the file and gives the job as it is now."""
        with connect(self._reach(config)) as connection:
            job = _identified(Job.load(self.path), connection)
            return job if job.problem_id is None else _heard(job, connection.status(job.problem_id))

    def fetch(
        self, config: Mapping[str, Any] | None = None, *, on_wait: Callable[["Job"], None] | None = None
    ) -> Solution:
        """Wait until the problem is done and return its solution; an interrupted submission is finished first.

        Args:
            config: of D-Wave's client.
            on_wait: called with the job whenever the service was asked and had no answer yet.

        Raises:
            LeapProblemError: the problem failed or was cancelled.
            LeapError: see `solvers.leap.errors`; the job is as it was, try again.
        """
        problem = self.problem()
        search = Search(problem, solver=self.solver)
        inner = SubSearch(normal_form(problem), search)
        with connect(self._reach(config)) as connection:
            received(inner.problem, inner, send(self, connection), connection, on_wait=on_wait)
        return search.solution(StopReason.COMPLETED, self.options)

    def _reach(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"endpoint": self.endpoint} | dict(config or {})

    def advanced(self, **changes: Any) -> "Job":
        """The job with some fields set anew, its file written."""
        job = dataclasses.replace(self, **changes)
        job.save()
        return job


def begin(
    problem: Problem,
    form: RemoteForm,
    guess: Estimate,
    *,
    solver: str,
    options: Mapping[str, Any],
    time_limit: float | None,
    folder: AnyPath,
    endpoint: str,
) -> Job:
    """Write the file of a new job, and the problem beside it; nothing is sent yet.

    Raises:
        UnsupportedProblemError: it is too large for the service's solver, or has too little or too much time.
    """
    if guess.refusal:
        raise UnsupportedProblemError(guess.refusal)
    now, name = datetime.datetime.now(datetime.UTC), uuid.uuid4().hex
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    fingerprint = problem.fingerprint()
    if not _problem_file(place, fingerprint).exists():
        problem.save(_problem_file(place, fingerprint))
    job = Job(
        path=place / f"{solver}-{now:%Y%m%d-%H%M%S}-{name[:8]}{SUFFIX}",
        solver=solver,
        options=dict(options),
        time_limit_s=guess.time_limit_s if time_limit is None else time_limit,
        label=f"qcompress {name}",
        fingerprint=fingerprint,
        record=form.record,
        created=now.isoformat(timespec="seconds"),
        endpoint=endpoint,
        remote=guess.remote,
        charge_s=guess.charge_s,
    )
    job.save()
    return job


def send(job: Job, connection: Connection, form: RemoteForm | None = None) -> Job:
    """Bring a job to the point where the service has its problem, from wherever it is; never submits it twice.

    Args:
        job: any state of it; the file's is taken.
        connection: to the service.
        form: the encoded problem, where the caller has it already.
    """
    with fasteners.InterProcessLock(str(job.path.with_suffix(".lock"))):  # two processes may go on with one job
        job = _identified(Job.load(job.path), connection)
        if job.problem_id is None and job.sending:
            time.sleep(SETTLE_S)
            job = _identified(job, connection)
        if job.problem_id is not None:
            return job
        form = job.form() if form is None else form
        back_end = _back_end(job.solver)
        remote = connection.solver(form.problem_type, job.remote)
        if job.data_id is None and back_end.uploads:
            with form.file() as file:
                job = job.advanced(data_id=connection.upload(file))
        data = {"format": "ref", "data": job.data_id} if back_end.uploads else form.data(remote)
        params = back_end.parameters(job.options, job.time_limit_s)
        job = job.advanced(sending=True)
        problem_id = connection.submit(remote, form.problem_type, data, params, job.label)
        return job.advanced(problem_id=problem_id, status="PENDING")


def received(
    problem: Problem,
    search: Search,
    job: Job,
    connection: Connection,
    *,
    form: RemoteForm | None = None,
    on_wait: Callable[[Job], None] | None = None,
) -> Job:
    """Wait for the answer of a job that was sent; decode, repair and polish it into ``search``.

    Args:
        problem: the job's, scaled as the solvers see it.
        search: takes the choices, the times and the details.
        job: was sent.
        connection: to the service.
        form: the encoded problem, where the caller has it already.
        on_wait: called with the job while there is no answer yet.

    Raises:
        LeapProblemError: the problem failed or was cancelled.
    """
    problem_id, pause = str(job.problem_id), FIRST_PAUSE_S
    while True:
        state = connection.status(problem_id, wait_s=math.ceil(pause))
        job = _heard(job, state)
        if job.status not in ("PENDING", "IN_PROGRESS"):
            break
        if on_wait is not None:
            on_wait(job)
        search.report()
        time.sleep(pause)
        pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_S)
    if job.status != "COMPLETED":
        reason = getattr(state, "error_message", None) or "the service does not say why"
        raise LeapProblemError(
            f"problem {problem_id} of job {job.path} ended as {job.status} ({reason}); submit it anew as another job"
        )
    done = connection.answer(problem_id)
    with search.phase("decode_s"):
        samples = _decoded(job, job.form() if form is None else form, done.answer, connection)
        if not len(samples.choices):
            raise LeapProblemError(
                f"the answer to problem {problem_id} of job {job.path} holds no samples; submit it anew as another job"
            )
        take(problem, search, samples)
    search.timing |= times(state, samples.timing_us)
    search.details |= {"job": str(job.path), "problem_id": problem_id, "remote": job.remote}
    search.details["record"] = dict(job.record)
    if "qpu_access_time" in samples.timing_us and job.solver == "qpu":
        read_s = search.timing["qpu_s"] / max(1, len(samples.choices))
        search.details["time_to_solution_s"] = time_to_solution(read_s, search.details["share_best"])
    return job


def _decoded(job: Job, form: RemoteForm, answer: Any, connection: Connection) -> Samples:
    try:
        return form.decode(answer, connection)
    except LeapError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, SolverError) as error:  # what damage does
        raise LeapError(
            f"the answer to problem {job.problem_id} of job {job.path} was not understood ({error}): fetch it again, "
            "or submit it anew as another job"
        ) from error


def jobs_in(folder: AnyPath) -> list[Job]:
    """All jobs of a folder, oldest first."""
    return sorted((Job.load(path) for path in Path(folder).glob(f"*{SUFFIX}")), key=lambda job: job.created)


def _back_end(name: str) -> Any:
    return registry.solver_class(name)


def _problem_file(folder: Path, fingerprint: str) -> Path:
    return folder / f"problem-{fingerprint[:16]}.npz"


def _identified(job: Job, connection: Connection) -> Job:
    """The job with its problem id, if the service already has the problem of an interrupted submission."""
    if job.problem_id is None and job.sending and (problem_id := connection.find(job.label)) is not None:
        return job.advanced(problem_id=problem_id, status="PENDING")
    return job


def _heard(job: Job, state: Any) -> Job:
    status = str(state.status.value)
    return job if status == job.status else job.advanced(status=status)
