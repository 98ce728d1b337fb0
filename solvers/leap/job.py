"""A job: one problem at the service, whose state is stored in a file that outlives the process.

    begin ──▶ file written ──▶ uploaded ──▶ sending ──▶ submitted ──▶ done
                  ╰───────── `send` resumes from any of these ──────╯     ╰─▶ `fetch`

The file is written before anything is sent and after every step. Each problem has a unique label. If a connection broke
during the submission, `send` looks up the label at the service and submits the problem only if it is not there. Each
job submits its problem at most once (once for each gauge of a quantum processor), and its file contains no token.
"""

import dataclasses
import datetime
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
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
from solvers.stated_search import StatedSearch

FILE_KIND = FileKind("qcompress leap job", version=2)
SUFFIX = ".job.json"

NOT_SENT, PARTLY_SENT = "NOT SENT", "PARTLY SENT"

FIRST_PAUSE_S, PAUSE_GROWTH, LONGEST_PAUSE_S = 0.01, 1.5, 10.0
"""First pause in seconds between two checks whether a problem is done, its growth factor, and the longest pause."""

SETTLE_S = 5.0
"""Time in seconds to wait for an interrupted request, which may still arrive, before the problem is sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One problem, sent to the service once, or once for each gauge.

    `begin` and `load` make a job; every step returns a new one and writes the file.

    Attributes:
        path: path of the job file; the problem's file is next to it.
        solver, options, time_limit_s: back end, options and time limit as requested.
        label: label of the first submission at the service (see `next_label`).
        fingerprint: fingerprint of the problem.
        record: record of its encoding (see `solvers.leap.forms`).
        created: time of creation, UTC, ISO 8601.
        endpoint, remote: address of the service, and name of its solver.
        charge_s: expected charge, in seconds of solver time.
        data_id: id of the uploaded model, once it is known.
        sending: whether the next submission may have been sent.
        problem_ids: ids of the submissions so far.
        status: last known status: NOT SENT, PARTLY SENT (some submissions are running, and charged, others were not
            sent; `fetch` sends them), PENDING, IN_PROGRESS, COMPLETED, FAILED or CANCELLED.
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
    problem_ids: tuple[str, ...] = ()
    status: str = NOT_SENT

    def save(self) -> None:
        """Write the file, atomically."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "path"}
        FILE_KIND.write_json(self.path, value)

    @classmethod
    def load(cls, path: AnyPath) -> "Job":
        """Read a job file.

        Raises:
            FileFormatError: the file is of another kind, incomplete, or has another version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            return cls(path=Path(path), **value | {"problem_ids": tuple(value["problem_ids"])})

    @property
    def problem_id(self) -> str | None:
        """The ids of the submissions, as one text, or None before the first."""
        return ", ".join(self.problem_ids) or None

    @property
    def submissions(self) -> list[dict[str, Any]]:
        """The parameters of each submission."""
        return _back_end(self.solver).submissions(self.options, self.time_limit_s)  # type: ignore[no-any-return]

    @property
    def sent(self) -> bool:
        """Whether everything was submitted."""
        return len(self.problem_ids) == len(self.submissions)

    @property
    def next_label(self) -> str:
        """Label of the next submission: the job's, with a number from the second one on."""
        return f"{self.label} {len(self.problem_ids) + 1}" if self.problem_ids else self.label

    def problem(self) -> Problem:
        """Return the problem that was sent.

        Raises:
            FileFormatError: the file next to the job contains another problem.
        """
        path = _problem_file(self.path.parent, self.fingerprint)
        problem = Problem.load(path)
        if problem.fingerprint() != self.fingerprint:
            raise FileFormatError(f"{path} does not hold the problem of job {self.path}")
        return problem

    def form(self) -> RemoteForm:
        """Return the problem in its encoded form."""
        form: RemoteForm = _back_end(self.solver).form_class()(normal_form(self.problem()).problem, self.record)
        return form

    def refresh(self, config: Mapping[str, Any] | None = None) -> "Job":
        """Ask the service for the problem's status, write the file and return the updated job. Sends no problem."""
        with connect(self._reach(config)) as connection:
            job = _identified(Job.load(self.path), connection)
            return _heard(job, list(map(connection.status, job.problem_ids))) if job.sent else job

    def fetch(
        self, config: Mapping[str, Any] | None = None, *, on_wait: Callable[["Job"], None] | None = None
    ) -> Solution:
        """Wait until the problem is done and return its solution; an interrupted submission is finished first.

        Args:
            config: configuration of D-Wave's client.
            on_wait: function called with the job whenever the service was asked and has no answer yet.

        Raises:
            LeapProblemError: the problem failed or was cancelled.
            LeapError: see `solvers.leap.errors`; the job is unchanged, so try again.
        """
        problem = self.problem()
        search = StatedSearch(problem, solver=self.solver)
        inner = SubSearch(normal_form(search.problem), search)
        with connect(self._reach(config)) as connection:
            received(inner.problem, inner, send(self, connection), connection, on_wait=on_wait)
        return search.solution(StopReason.COMPLETED, self.options)

    def _reach(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"endpoint": self.endpoint} | dict(config or {})

    def advanced(self, **changes: Any) -> "Job":
        """Return the job with some fields replaced, and write its file."""
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
    """Write the files of a new job and of its problem, without sending anything.

    Raises:
        UnsupportedProblemError: the problem is too large for the service's solver, or the time limit is out of range.
    """
    if guess.refusal:
        raise UnsupportedProblemError(guess.refusal)
    assert guess.charge_s is not None  # noqa: S101  (the service's solver is known)
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
    """Submit what is missing of a job in any state, unless the service already has it; submits nothing twice.

    Args:
        job: the job; its current state is read from the file.
        connection: connection to the service.
        form: the encoded problem, if the caller already has it.
    """
    with fasteners.InterProcessLock(str(job.path.with_suffix(".lock"))):  # two processes may resume the same job
        job = _identified(Job.load(job.path), connection)
        if job.sending:
            time.sleep(SETTLE_S)
            job = _identified(job, connection)
        if job.sent:
            return job
        form = job.form() if form is None else form
        back_end = _back_end(job.solver)
        remote = connection.solver(form.problem_type, job.remote)
        if job.data_id is None and back_end.uploads:
            with form.file() as file:
                job = job.advanced(data_id=connection.upload(file))
        for gauge, params in list(enumerate(job.submissions))[len(job.problem_ids) :]:
            data = {"format": "ref", "data": job.data_id} if back_end.uploads else form.data(remote, gauge)
            job = job.advanced(sending=True)
            job = _submitted(job, connection.submit(remote, form.problem_type, data, params, job.next_label))
        return job


def received(
    problem: Problem,
    search: Search,
    job: Job,
    connection: Connection,
    *,
    form: RemoteForm | None = None,
    on_wait: Callable[[Job], None] | None = None,
) -> Job:
    """Wait for the answer to a submitted job, then decode, repair and polish it for ``search``.

    Args:
        problem: the problem of the job, scaled as solvers see it.
        search: the search that gets the choices, the times and the details.
        job: a job that was submitted.
        connection: connection to the service.
        form: the encoded problem, if the caller already has it.
        on_wait: function called with the job while there is no answer yet.

    Raises:
        LeapProblemError: the problem failed or was cancelled.
    """
    pause = FIRST_PAUSE_S
    while True:
        states = [connection.status(problem_id, wait_s=math.ceil(pause)) for problem_id in job.problem_ids]
        job = _heard(job, states)
        if job.status not in ("PENDING", "IN_PROGRESS"):
            break
        if on_wait is not None:
            on_wait(job)
        search.report()
        time.sleep(pause)
        pause = min(PAUSE_GROWTH * pause, LONGEST_PAUSE_S)
    if job.status != "COMPLETED":
        messages = [reason for state in states if (reason := getattr(state, "error_message", None))]
        reason = ", ".join(messages) or "the service gives no reason"
        raise LeapProblemError(
            f"problem {job.problem_id} of job {job.path} ended as {job.status} ({reason}); submit it again as a new job"
        )
    done = [connection.answer(problem_id) for problem_id in job.problem_ids]
    with search.phase("decode_s"):
        samples = _decoded(job, job.form() if form is None else form, [one.answer for one in done], connection)
        if not len(samples.choices):
            raise LeapProblemError(
                f"the answer to problem {job.problem_id} of job {job.path} has no samples; submit it again as a new job"
            )
        take(problem, search, samples)
    search.timing |= times(states, samples.timing_us)
    search.details |= {"job": str(job.path), "problem_id": job.problem_id, "remote": job.remote}
    search.details["record"] = dict(job.record)
    if "qpu_access_time" in samples.timing_us and job.solver == "qpu":
        read_s = search.timing["qpu_s"] / max(1, len(samples.choices))
        search.details["time_to_solution_s"] = time_to_solution(read_s, search.details["share_best"])
    return job


def _decoded(job: Job, form: RemoteForm, answers: Sequence[Any], connection: Connection) -> Samples:
    try:
        return form.decode(answers, connection)
    except LeapError:
        raise
    except (
        AttributeError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        SolverError,
    ) as error:  # raised for damaged answers
        raise LeapError(
            f"the answer to problem {job.problem_id} of job {job.path} was not understood ({error}): fetch it again, "
            "or submit it again as a new job"
        ) from error


def jobs_in(folder: AnyPath) -> list[Job]:
    """Return all jobs in a folder, oldest first."""
    return sorted((Job.load(path) for path in Path(folder).glob(f"*{SUFFIX}")), key=lambda job: job.created)


def _back_end(name: str) -> Any:
    return registry.solver_class(name)


def _problem_file(folder: Path, fingerprint: str) -> Path:
    return folder / f"problem-{fingerprint[:16]}.npz"


def _identified(job: Job, connection: Connection) -> Job:
    """Return the job, with the id of an interrupted submission if the service has it."""
    if job.sending and (problem_id := connection.find(job.next_label)) is not None:
        return _submitted(job, problem_id)
    return job


def _submitted(job: Job, problem_id: str) -> Job:
    ids = (*job.problem_ids, problem_id)
    status = "PENDING" if len(ids) == len(job.submissions) else PARTLY_SENT
    return job.advanced(problem_ids=ids, sending=False, status=status)


def _heard(job: Job, states: Sequence[Any]) -> Job:
    """Return the job with the status of all its submissions: the worst, or else the least advanced."""
    heard = [str(state.status.value) for state in states]
    status = next((word for word in ("FAILED", "CANCELLED", "PENDING", "IN_PROGRESS") if word in heard), heard[0])
    return job if status == job.status else job.advanced(status=status)
