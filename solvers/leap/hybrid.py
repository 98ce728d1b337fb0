"""Leap's hybrid solvers as back ends, for CQM, BQM and nonlinear models.

Each run sends one problem with a job file; the samples of the answer are decoded, repaired and polished. The time limit
applies to the service's solver, without the time in the queue. After Ctrl-C the job remains, and its answer can be
fetched later.
"""

import importlib.metadata
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.encodings import ENCODINGS
from formulations.reductions.scaling import normal_form
from solvers.base import Search, Solver
from solvers.errors import UnsupportedProblemError
from solvers.kernels.warm import warm

if TYPE_CHECKING:
    from solvers.leap.connection import Connection
    from solvers.leap.estimate import Estimate
    from solvers.leap.forms import RemoteForm
    from solvers.leap.job import Job

JOBS = "leap-jobs"
"""Folder of the job files, in the current folder."""


@dataclass(frozen=True)
class LeapSolver(Solver):
    """A back end that sends a problem to the service.

    Attributes:
        remote: name of the service's solver; if empty, the configured one, or the newest (the largest processor).
        jobs: folder of the job files.
        config: arguments of ``dwave.cloud.Client.from_config`` (token, endpoint, …); never shown and never stored.
    """

    needs_network: ClassVar[bool] = True
    deterministic: ClassVar[bool] = False
    honours_time_limit: ClassVar[bool] = False  # the limit applies to the service, without the queue
    presolved: ClassVar[bool] = False  # a job's file contains the original problem
    extra: ClassVar[str] = "dwave"
    distributions: ClassVar[tuple[str, ...]] = ("dwave-cloud-client", "fasteners")
    has_jobs: ClassVar[bool] = True  # each run sends one problem, whose answer may be fetched later
    uploads: ClassVar[bool] = True  # the model is uploaded first, as a file
    service_knows: ClassVar[str] = "the sizes it takes, the minimum time limit (the default) and the use of the quota"
    remote: str = ""
    jobs: str = JOBS
    config: Any = field(default=None, repr=False)

    @classmethod
    @abstractmethod
    def form_class(cls) -> type["RemoteForm"]:
        """Return the class of the form in which the problem is stated."""

    @classmethod
    def submissions(cls, options: Mapping[str, Any], time_limit_s: float | None) -> list[dict[str, Any]]:  # noqa: ARG003
        """Return the parameters of each submission of a job."""
        return [{"time_limit": time_limit_s}]

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return option name → default, without ``config``, which may contain a token."""
        return {name: value for name, value in super().option_defaults().items() if name != "config"}

    @classmethod
    def why_not(cls) -> str:
        """Say which packages are missing. Imports nothing (``dwave`` itself is installed with the samplers)."""
        missing = [name for name in cls.distributions if not _installed(name)]
        if not missing:
            return ""
        return f"solver {cls.name!r} needs {', '.join(missing)}: pip install 'qcompress[{cls.extra}]'"

    def require_access(self) -> None:
        """Check that an API token is configured.

        Raises:
            LeapTokenError: there is none.
        """
        from solvers.leap.connection import require_token

        require_token(self.config)

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Send, wait, decode, repair, polish."""
        from solvers.leap.connection import connect

        if self.decided(problem, search):
            return
        with connect(self.config) as connection:
            self.ask(problem, search, connection)

    @staticmethod
    def decided(problem: Problem, search: Search) -> bool:
        """Whether there is nothing to decide, and so nothing to pay for; the only choice is then reported."""
        if problem.num_options > problem.num_groups:
            return False
        search.offer(np.zeros(problem.num_groups, dtype=np.int64))
        search.close()
        return True

    def ask(
        self,
        problem: Problem,
        search: Search,
        connection: "Connection",
        job: "Job | None" = None,
        on_begun: "Callable[[Job], object]" = lambda _: None,
    ) -> None:
        """Send one problem and process its answer, or finish a ``job`` that was begun.

        Args:
            problem: the scaled problem; ``search.original`` is the original one.
            search: the search that gets the choices, the times and the details.
            connection: connection to the service.
            job: job of this problem from an interrupted run, or None.
            on_begun: function called with a new job before anything is sent.
        """
        from solvers.leap.job import received, send

        form = None
        if job is None:
            with search.phase("build_s"):
                form, guess = self.stated(problem, connection, search.limit)
                job = self.job_of(search.original, form, guess, connection, search.limit)
            form.tell_times(search.timing)
            on_begun(job)
        search.details["job"] = str(job.path)
        with search.phase("send_s"):
            job = send(job, connection, form)
        received(problem, search, job, connection, form=form)

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> "Job":
        """Send ``problem`` and return its job immediately; see `solvers.solve` with ``wait=False``."""
        from solvers.leap.connection import connect
        from solvers.leap.job import send

        if problem.num_options == problem.num_groups:
            raise UnsupportedProblemError(
                "every group has one option: there is nothing to decide, and nothing was sent"
            )
        with connect(self.config) as connection:
            form, guess = self.stated(normal_form(problem).problem, connection, time_limit)
            return send(self.job_of(problem, form, guess, connection, time_limit), connection, form)

    def estimate(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":
        """Estimate the submission of ``problem``; asks the service for its solver's properties but sends nothing."""
        from solvers.leap.connection import connect

        with connect(self.config) as connection:
            return self.stated(normal_form(problem).problem, connection, time_limit)[1]

    def preview(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":
        """Estimate the submission of ``problem``, with or without the service, for a dry run.

        Where the service cannot be asked, the estimate says what was not looked up and why; where it has no such
        solver, the estimate is a refusal.
        """
        from solvers.leap.errors import LeapError, LeapSolverError

        try:
            return self.estimate(problem, time_limit=time_limit)
        except LeapSolverError as error:
            return replace(self.offline(problem, time_limit=time_limit), refusal=str(error))
        except LeapError as error:
            why = f"only the service knows {self.service_knows}; not looked up: {error}"
            return replace(self.offline(problem, time_limit=time_limit), not_looked_up=why)

    def offline(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":
        """Estimate the submission of ``problem`` by what is known without a token and the network."""
        from solvers.leap.estimate import without_service

        form = self.form_class().first(normal_form(problem).problem, None, self.option_values)
        return without_service(form.problem_type, form.sizes(), remote=self.remote, time_limit=time_limit)

    def stated(
        self, problem: Problem, connection: "Connection", time_limit: float | None
    ) -> tuple["RemoteForm", "Estimate"]:
        """Return the form of ``problem`` for the service's solver, and the estimate of its submission."""
        from solvers.leap.estimate import estimate

        form_class = self.form_class()
        remote = connection.solver(form_class.problem_type, self.remote)
        form = form_class.first(problem, remote, self.option_values)
        return form, estimate(form, remote, time_limit)

    def job_of(
        self,
        problem: Problem,
        form: "RemoteForm",
        guess: "Estimate",
        connection: "Connection",
        time_limit: float | None,
    ) -> "Job":
        """Return a new job, and write its file."""
        from solvers.leap.job import begin

        return begin(
            problem,
            form,
            guess,
            solver=self.name,
            options=self.option_values,
            time_limit=time_limit,
            folder=self.jobs,
            endpoint=connection.endpoint,
        )


@dataclass(frozen=True)
class LeapCqm(LeapSolver):
    """The hybrid CQM solver, with groups and budgets as constraints, which is the natural form."""

    name: ClassVar[str] = "leap-cqm"
    summary: ClassVar[str] = "D-Wave Leap's hybrid CQM solver: groups and budgets as constraints"

    @classmethod
    def form_class(cls) -> type["RemoteForm"]:
        """Return the CQM form."""
        from solvers.leap.forms import CqmForm

        return CqmForm


@dataclass(frozen=True)
class LeapNonlinear(LeapSolver):
    """The hybrid nonlinear solver, with integer decisions, tables, and pair terms in factor form."""

    name: ClassVar[str] = "leap-nl"
    summary: ClassVar[str] = "D-Wave Leap's hybrid nonlinear solver: tables looked up, the factor kept"
    distributions: ClassVar[tuple[str, ...]] = (*LeapSolver.distributions, "dwave-optimization")

    @classmethod
    def form_class(cls) -> type["RemoteForm"]:
        """Return the nonlinear form."""
        from solvers.leap.forms import NonlinearForm

        return NonlinearForm


@dataclass(frozen=True)
class LeapBqm(LeapSolver):
    """The hybrid BQM solver on the QUBO.

    Attributes:
        encoding: name of the encoding, same as in `formulations.to_bqm`.
    """

    name: ClassVar[str] = "leap-bqm"
    summary: ClassVar[str] = "D-Wave Leap's hybrid BQM solver on the QUBO; decoded, repaired, polished"
    native_constraints: ClassVar[bool] = False
    words: ClassVar[Mapping[str, Collection[str]]] = {"encoding": ENCODINGS}
    encoding: str = "domain-wall"

    @classmethod
    def form_class(cls) -> type["RemoteForm"]:
        """Return the QUBO form."""
        from solvers.leap.forms import BqmForm

        return BqmForm


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
