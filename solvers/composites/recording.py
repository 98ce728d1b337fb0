"""`Recording` writes a run to a file while it is running; `Replay` is a solver that repeats a recorded run.

The file is append-only, with one JSON object per line: for every run a header (solver and problem), then an event for
every reported choice and every proven bound, with its time. Each line is written whole by one call and contains the
number of its run, so that several processes can write to the same file. Truncated lines, after a crash of the machine,
are ignored when the file is read.
"""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from formulations import FileFormatError, Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.reductions.base import IdentityReduction
from solvers.base import Search, Solver, SubSearch
from solvers.composites.wrapper import Wrapper
from solvers.errors import InvalidOptionError

FILE_KIND = FileKind("qcompress recording", version=1)


@dataclass(frozen=True)
class Recording(Wrapper):
    """Run a solver and record its results as they are found, in the unit of the original problem.

    Attributes:
        path: path of the file, which may contain earlier runs.

    >>> import tempfile
    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> problem, path = layered_problem(5), tempfile.mkdtemp() + "/runs.jsonl"
    >>> first = solve(problem, Recording("anneal", path), seed=0)
    >>> solve(problem, Replay(path)).objective == first.objective
    True
    """

    name: ClassVar[str] = "recording"
    summary: ClassVar[str] = "writes every choice and bound of a solver to a file, with times"
    presolved: ClassVar[bool] = False  # the recording refers to the original problem
    path: AnyPath = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not os.fspath(self.path):
            raise InvalidOptionError("a recording needs a path: Recording('anneal', 'runs.jsonl')")
        object.__setattr__(self, "path", os.fspath(self.path))  # a plain string, for files and other processes

    def run(self, problem: Problem, search: Search) -> None:
        """Run the inner solver and record its results."""
        solver = self.inner
        seed = int(search.rng.integers(2**31)) if search.seed is None else search.seed
        header = {
            **FILE_KIND.header,
            "problem": search.original.fingerprint(),
            "groups": problem.num_groups,
            "solver": solver.name,
            "options": {name: repr(value) for name, value in solver.option_values.items()},
            "seed": seed,
            "time_limit": search.limit,
        }
        with _Writer(self.path, header) as writer:
            inner = _Recorded(search, solver, seed, writer)
            if search.choice is not None:  # known before the solver started
                writer.write(t_s=search.elapsed(), choice=search.choice.tolist())
            if search.bound is not None:
                writer.write(t_s=search.elapsed(), bound=search.stated.as_stated(search.stated.bound))
            try:
                solver.run(problem, inner)
            finally:
                writer.write(t_s=search.elapsed(), end=True)
                search.details |= inner.details
                search.timing |= inner.timing
                search.pool.extend(inner.pool)
                search.details["recorded"] = self.path


class _Recorded(SubSearch):
    """Record results before they are passed on."""

    def __init__(self, outer: Search, solver: Solver, seed: int, writer: "_Writer") -> None:
        same = IdentityReduction(original=outer.problem)
        super().__init__(same, outer, initial=outer.initial, apart=True, seed=seed, solver=solver.name)
        self._writer = writer

    def offer(self, choice: ArrayLike) -> bool:
        self._writer.write(t_s=self.outer.elapsed(), choice=np.asarray(choice, dtype=np.int64).tolist())
        return super().offer(choice)

    def raise_bound(self, bound: float) -> bool:
        if np.isfinite(bound):
            self._writer.write(t_s=self.outer.elapsed(), bound=self.as_stated(float(bound)))
        return super().raise_bound(bound)

    def close(self) -> None:
        self._writer.write(t_s=self.outer.elapsed(), closed=True)
        super().close()


class _Writer:
    """Append whole lines to a recording, after checking that the file is one."""

    def __init__(self, path: AnyPath, header: dict[str, Any]) -> None:
        self._run = uuid.uuid4().hex[:12]
        if Path(path).exists():
            _read(path)  # refuses a file of another kind
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # the last line is truncated
        self.write(**header)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, **event: Any) -> None:
        line = json.dumps({"run": self._run, **event}, allow_nan=False).encode() + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"no room for a line of {len(line)} bytes in the recording")


@dataclass(frozen=True)
class Replay(Solver):
    """Repeat the last recorded run on this problem, with the same choices and bounds in the same order.

    ``details["recorded"]`` is the header of the recorded run. ``details["course"]`` lists the state after each of its
    events as ``[t_s, objective, bound]`` with the recorded times, because the replay itself takes almost no time.

    Attributes:
        path: path of the recording.
    """

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "repeats a recorded run"
    presolved: ClassVar[bool] = False
    path: AnyPath = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not os.fspath(self.path):
            raise InvalidOptionError("a replay needs the path of a recording: Replay('runs.jsonl')")
        object.__setattr__(self, "path", os.fspath(self.path))

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem for which the recording has no run."""
        runs = _read(self.path)
        fingerprint = problem.fingerprint()
        if any(run[0]["problem"] == fingerprint for run in runs):
            return ""
        recorded = ", ".join(f"{run[0]['problem'][:8]}… of {run[0]['groups']} groups" for run in runs) or "none"
        return (
            f"{self.path} has no run on this problem ({fingerprint[:8]}… of {problem.num_groups} groups); "
            f"it has runs on: {recorded}"
        )

    def run(self, problem: Problem, search: Search) -> None:  # noqa: ARG002 - choices refer to the stated problem
        """Report the recorded choices and bounds again, in their order."""
        fingerprint = search.original.fingerprint()
        header, *events = [run for run in _read(self.path) if run[0]["problem"] == fingerprint][-1]
        search.details["recorded"] = header
        course = search.details["course"] = []
        for event in events:
            if search.expired():
                return
            if "choice" in event:
                search.offer(event["choice"])
            elif "bound" in event:
                search.raise_bound((event["bound"] - search.constant) / search.unit)
            elif "closed" in event:
                search.close()
            stated = search.stated
            state = [stated.as_stated(stated.objective), stated.as_stated(stated.bound)]
            if not course or course[-1][1:] != state:
                course.append([event["t_s"], *state])


def _read(path: AnyPath) -> list[list[dict[str, Any]]]:
    """Read the runs of a recording in the order of their start, each as its header and its events.

    Raises:
        FileNotFoundError: the file does not exist.
        FileFormatError: the file is no recording, or of a newer version.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in Path(path).read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
            run = event.pop("run")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if line and not line.startswith(b'{"run": "'):  # truncated lines of a recording are ignored
                raise FileFormatError(f"{path} is not a {FILE_KIND.name} file: found {line[:40]!r}") from error
            continue
        if run not in runs:
            FILE_KIND.require(event, path)
        runs.setdefault(run, []).append(event)
    return list(runs.values())
