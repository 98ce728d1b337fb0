"""Solvers in separate processes ("lanes"), which share one incumbent and one bound.

    portfolio ◀── choice, bound, ask ── lane        The lane asks for news when it checks the clock, and waits for the
              ── news ──▶                           answer, so no pipe ever fills up, however large the choices are.

A lane ends when its parent ends, for whatever reason, and leaves no processes behind. Objective numbers in messages are
scaled as in the parent.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.base import Search, Solver
from solvers.errors import SolverError, described
from solvers.kernels.moves import Integers

ASK_S = 0.05
"""Time in seconds between two requests of a lane for news."""

GRACE_S = 0.3
"""Time in seconds that lanes have to end by themselves before they are killed."""


def context() -> Any:
    """Return the start method: processes forked from a clean, warm server if possible, else new processes."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(
        ["solvers.composites.warmed", "joblib.externals.loky"]
    )  # the parent may be a worker of joblib
    return forkserver


def prepare() -> None:
    """Start the server from which lanes are forked; this takes some seconds the first time in a process.

    Raises:
        SolverError: this program cannot start processes.
    """
    process = context().Process(target=_nothing, daemon=True)
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    if code != 0:
        raise SolverError(
            f"a process of the portfolio ended with exit code {code} before it started (its error is above); "
            "in a script the call belongs below: if __name__ == '__main__':"
        )


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The task of a lane, as plain data that can be sent to another process."""

    solver: Solver
    problem: Problem
    time_limit: float | None
    seed: int
    initial: Integers | None
    unit: float
    constant: float


class Lane:
    """The parent's view of a running lane."""

    def __init__(self, task: Task) -> None:
        self.name = task.solver.name
        self.summary: dict[str, Any] = {
            "solver": task.solver.name,
            "seed": task.seed,
            "outcome": "ended by the first proof",
        }
        self._told, self._start = 0, time.perf_counter()
        processes = context()
        self.connection, theirs = processes.Pipe()
        self._process = processes.Process(target=_work, args=(task, theirs), name=f"lane {self.name}", daemon=True)
        self._process.start()
        theirs.close()

    def terminate(self) -> None:
        """Ask the lane's process to end."""
        self._process.terminate()

    def bury(self, seconds: float) -> None:
        """Wait up to ``seconds`` for the process to end, then kill it and everything that it started."""
        self._process.join(max(0.0, seconds))
        if self._process.exitcode != 0 and self._process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads its own process group
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()

    def hear(self) -> tuple[str, Any]:
        """Return the next message: ``choice``, ``bound``, ``closed``, ``ask``, or at the end ``done`` or ``failed``."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return "failed", f"its process died (exit code {self._process.exitcode})"
        return str(kind), value

    def tell(self, version: int, choice: Integers | None, bound: float | None) -> None:
        """Answer a request with incumbent and bound, if they are newer than those the lane knows."""
        news = (choice, bound) if version > self._told else None
        self._told = version
        with contextlib.suppress(OSError):  # if the lane just died, its next message says so
            self.connection.send(news)

    def close(self, outcome: str, details: Any = None) -> None:
        """Record how the lane ended."""
        self.summary |= {"outcome": outcome, "wall_s": time.perf_counter() - self._start}
        if details is not None:
            self.summary["details"] = details


def end(lanes: Sequence[Lane]) -> None:
    """End lanes and everything that they started, before returning."""
    for lane in lanes:
        lane.terminate()
    deadline = time.perf_counter() + GRACE_S
    for lane in lanes:
        lane.bury(deadline - time.perf_counter())


# --- in the lane ---------------------------------------------------------------------------------------------------


class _LaneSearch(Search):
    """Send results to the parent, and take over results of others whenever the solver checks the clock."""

    def __init__(self, task: Task, connection: Connection) -> None:
        super().__init__(
            task.problem, solver=task.solver.name, time_limit=task.time_limit, seed=task.seed, initial=task.initial
        )
        self._connection, self._asked, self._parent_bound = connection, -np.inf, -np.inf
        self._unit, self.constant = task.unit, task.constant

    @property
    def unit(self) -> float:
        return self._unit

    def offer(self, choice: ArrayLike) -> bool:
        if kept := super().offer(choice):
            self._connection.send(("choice", self.choice))
        return kept

    def raise_bound(self, bound: float) -> bool:
        kept = super().raise_bound(bound)
        if self.bound is not None and self.bound > self._parent_bound:
            self._parent_bound = self.bound
            self._connection.send(("bound", self.bound))
        return kept

    def close(self) -> None:
        super().close()
        if self.choice is None:
            self._connection.send(("closed", None))
        elif self.bound is not None:
            self._connection.send(("bound", self.bound))

    def expired(self) -> bool:
        if time.perf_counter() - self._asked > ASK_S:
            self._connection.send(("ask", None))
            if (news := self._connection.recv()) is not None:
                choice, bound = news
                if choice is not None:
                    super().offer(choice)
                if bound is not None:
                    self._parent_bound = max(self._parent_bound, bound)
                    super().raise_bound(bound)
            self._asked = time.perf_counter()
        return super().expired() or self.proven()


def _work(task: Task, connection: Connection) -> None:
    """Run a task in a lane's process, from start to end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches only the parent, and all processes started here can be killed as a group
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        task.solver.prepare()
        search = _LaneSearch(task, connection)
        task.solver.run(task.problem, search)
        connection.send(("done", search.details))
    except (EOFError, BrokenPipeError):
        return  # the parent has ended
    except Exception as error:
        connection.send(("failed", described(error)))


def _leave(*_: Any) -> None:
    raise SystemExit


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
