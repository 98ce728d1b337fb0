"""The connection to the service through D-Wave's client, with clear error messages.

Uploads and the selection of a solver use ``dwave.cloud.Client``. Problems are submitted through its ``api.Problems``
resource, which sends one request per call, so it is always known what was sent. The client never repeats POST requests
by itself, so no problem is submitted twice.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import requests
from dwave.cloud import Client
from dwave.cloud.api import Problems
from dwave.cloud.api import exceptions as api
from dwave.cloud.api.models import ProblemData, ProblemJob
from dwave.cloud.config import load_config
from dwave.cloud.config.exceptions import ConfigFileError
from dwave.cloud.exceptions import ProblemUploadError

from solvers.leap.errors import (
    LeapConnectionError,
    LeapError,
    LeapProblemError,
    LeapQuotaError,
    LeapSolverError,
    LeapTokenError,
)
from solvers.leap.secrecy import mask_logs

NO_TOKEN = (
    "no D-Wave API token: copy it from your Leap dashboard (cloud.dwavesys.com/leap) into the environment variable "  # noqa: S105
    "DWAVE_API_TOKEN, or run 'dwave config create'"
)


class Connection:
    """An open connection to the service; made by `connect`."""

    def __init__(self, client: Any, problems: Any) -> None:
        self._client, self._problems = client, problems
        self._found: dict[tuple[str, str], Any] = {}  # solvers by problem type and name

    @property
    def endpoint(self) -> str:
        """Address of the service."""
        return str(self._client.config.endpoint)

    def solvers(self) -> list[Any]:
        """Return all solvers of the account, as ``dwave.cloud`` solver objects."""
        with plainly("listing the solvers", self.endpoint):
            return list(self._client.get_solvers(order_by="name"))

    def solver(self, problem_type: str, name: str = "") -> Any:
        """Return the solver called ``name``, or the configured one, or as Ocean does the processor with most qubits.

        The selection does not depend on the load, so all runs of a sweep use the same processor. Of several hybrid
        solvers it is the newest one.

        Raises:
            LeapSolverError: there is no such solver, or it does not accept problems of this type.
        """
        solver = self._found.get((problem_type, name)) or self._look_up(problem_type, name)
        if problem_type not in solver.supported_problem_types:
            takes = ", ".join(sorted(solver.supported_problem_types))
            raise LeapSolverError(f"solver {solver.name!r} takes {takes} problems, not {problem_type}; choose another")
        self._found[problem_type, name] = self._found[problem_type, solver.name] = solver
        return solver

    def _look_up(self, problem_type: str, name: str) -> Any:
        with plainly("looking up a solver", self.endpoint):
            try:
                if name:
                    return self._client.get_solver(name=name)
                order = _most_qubits if problem_type == "ising" else "-properties.version"
                if configured := self._client.config.solver:
                    return self._client.get_solver(order_by=configured.get("order_by", order))
                if problem_type == "ising":
                    return self._client.get_solver(qpu=True, order_by=order)
                return self._client.get_solver(supported_problem_types__contains=problem_type, order_by=order)
            except api.ResourceNotFoundError as error:
                offered = [
                    f"{solver.name} ({', '.join(sorted(solver.supported_problem_types))})" for solver in self.solvers()
                ]
                wanted = f"solver {name!r}" if name else f"solver for {problem_type} problems"
                raise LeapSolverError(
                    f"the account has no {wanted} that is online; it has: {'; '.join(offered) or 'none'}"
                ) from error

    def upload(self, file: Any) -> str:
        """Upload an encoded model and return its id for submissions."""
        with plainly("uploading the model", self.endpoint):
            return str(self._client.upload_problem_encoded(file).result())

    def submit(self, solver: Any, problem_type: str, data: Mapping[str, Any], params: Any, label: str) -> str:
        """Submit one problem and return its id. This sends one request, without repetitions."""
        job = ProblemJob(
            data=ProblemData.model_validate(dict(data)),
            params=dict(params),
            solver=solver.identity,
            type=problem_type,
            label=label,
        )
        with plainly("submitting the problem", self.endpoint):
            (answer,) = self._problems.submit_problems([job])
        if code := getattr(answer, "error_code", None):
            raise _by_code(int(code), answer.error_msg, self.endpoint)
        return str(answer.id)

    def find(self, label: str) -> str | None:
        """Return the id of the problem that was submitted with ``label``, or None."""
        with plainly("listing submitted problems", self.endpoint):
            problems = self._problems.list_problems(label=label)
        return next((str(problem.id) for problem in problems if problem.label == label), None)

    def status(self, problem_id: str, wait_s: int = 0) -> Any:
        """Return the problem's state; if it is not done, the service may take up to ``wait_s`` seconds to answer."""
        with plainly("asking for a problem's status", self.endpoint):
            problems = self._problems.list_problems(id=problem_id, timeout=wait_s or None)
        if not problems:
            raise LeapProblemError(
                f"the service at {self.endpoint} does not know problem {problem_id} (any more); submit it again as a "
                "new job"
            )
        return problems[0]

    def answer(self, problem_id: str) -> Any:
        """Return the state of a completed problem, with its answer."""
        with plainly("fetching the answer", self.endpoint):
            return self._problems.get_problem(problem_id)

    def download(self, answer: Any) -> io.BytesIO:
        """Return the file that an answer refers to."""
        with plainly("fetching the file of the answer", self.endpoint):
            return self._problems.get_answer_data(answer)  # type: ignore[no-any-return]


@contextlib.contextmanager
def connect(config: Mapping[str, Any] | None = None) -> Iterator[Connection]:
    """Connect to the service; the connection is closed at the end of the block.

    Args:
        config: arguments of ``dwave.cloud.Client.from_config``, which override environment and configuration file.

    Raises:
        LeapTokenError: no API token is configured.
        LeapError: the configuration cannot be read.
    """
    require_token(config)
    with contextlib.ExitStack() as stack:
        with plainly("starting the client"):
            client = stack.enter_context(Client.from_config(**({"connection_close": True} | dict(config or {}))))
            problems = stack.enter_context(Problems.from_config(client.config))
        yield Connection(client, problems)


def require_token(config: Mapping[str, Any] | None = None) -> None:
    """Check, without the network, that an API token is configured.

    Raises:
        LeapTokenError: there is none.
        LeapError: the configuration cannot be read.
    """
    if why := missing_token(config):
        raise LeapTokenError(why)


def missing_token(config: Mapping[str, Any] | None = None) -> str:
    """Say what to do if no API token is configured, or return an empty string. Uses no network.

    Raises:
        LeapError: the configuration cannot be read.
    """
    mask_logs()
    with plainly("reading the configuration"):
        return "" if load_config(**dict(config or {})).get("token") else NO_TOKEN


@contextlib.contextmanager
def plainly(when: str, endpoint: str = "") -> Iterator[None]:
    """Convert errors of the client within the block to a `LeapError`; other exceptions pass through."""
    try:
        yield
    except LeapError:
        raise
    except (ConfigFileError, ValueError) as error:
        why, *_ = str(error).splitlines() or [type(error).__name__]
        if endpoint:
            raise LeapError(f"the service's answer was not understood while {when}: {why}") from error
        raise LeapError(f"D-Wave's client cannot be configured: {why}") from error
    except (api.RequestError, requests.RequestException, ProblemUploadError) as error:
        raise _plain(error, when, endpoint) from error


def _most_qubits(solver: Any) -> tuple[int, str]:
    """Order of processors: Ocean's, most qubits in working order first; then by name."""
    return -len(solver.properties.get("qubits", ())), solver.name


def _plain(error: BaseException, when: str, endpoint: str) -> LeapError:
    cause: BaseException | None = error
    while cause is not None:  # an upload error contains the actual error as its cause
        if isinstance(cause, api.ResourceAuthenticationError):
            return _by_code(401, "", endpoint)
        if code := getattr(cause, "error_code", None):
            return _by_code(int(code), str(cause), endpoint)
        if isinstance(cause, api.ResourceBadResponseError):
            return LeapError(f"the service's answer was not understood while {when}: {cause}")
        cause = cause.__cause__
    return LeapConnectionError(
        f"no connection to the service at {endpoint} while {when}; nothing is lost: try again when the network is there"
    )


def _by_code(code: int, message: str, endpoint: str) -> LeapError:
    if code == 401:
        return LeapTokenError(
            f"the service at {endpoint} does not accept the API token; copy it again from your Leap dashboard"
        )
    if code == 403:
        return LeapTokenError(f"the account may not do this at {endpoint}: {message}")
    if code == 429 or "quota" in message.lower():
        return LeapQuotaError(
            f"the service takes no more problems now ({message}); check the quota in your Leap dashboard, or try later"
        )
    if code >= 500:
        return LeapConnectionError(f"the service at {endpoint} failed ({code}: {message}); try again later")
    return LeapProblemError(f"the service refused the request ({code}: {message})")
