"""Solvers in processes of their own, with one incumbent and one bound in common.

    portfolio ◀── choice, bound, ask ── lane        The lane asks for news when it looks at the clock, and waits for the
              ── news ──▶                           answer: so no pipe ever fills up, however large the choices are.

What always holds: a lane ends with its parent, whatever ends that; nothing it started itself is left behind; objective
numbers that pass between the two are scaled as the parent's.
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
from solvers.errors import SolverError
from solvers.kernels.moves import Integers

ASK_S = 0.05
"""Seconds between two questions of a lane for news."""

GRACE_S = 0.3
"""Seconds that lanes may take to end by themselves before they are killed."""


def context() -> Any:
    """How processes are started: forked from a clean, warm server where the system can, else as new processes."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(
        ["solvers.composites.warmed", "joblib.externals.loky"]
    )  # a parent may be a worker of joblib's
    return forkserver


def prepare() -> None:
    """Start the server that lanes are forked from; takes some seconds the first time in a process.

    Raises:
        SolverError: no process can be started from this program.
    """
    process = context().Process(target=_nothing, daemon=True)
    process.start()
    process.join()
    code = process.exitcode
    process.close()
    if code != 0:
        raise SolverError(
            f"a process of the portfolio ended with exit code {code} before it began (its own error is above); "
            "in a script the call belongs below: if __name__ == '__main__':"
        )


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a lane is to do; plain data, for it travels to another process."""

    solver: Solver
    problem: Problem
    time_limit: float | None
    seed: int
    initial: Integers | None
    unit: float


class Lane:
    """A running lane, as its parent sees it."""

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
        """Ask its process to end."""
        self._process.terminate()

    def bury(self, seconds: float) -> None:
        """Wait for the process to end; after that time kill it and everything that it started."""
        self._process.join(max(0.0, seconds))
        if self._process.exitcode != 0 and self._process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its group is its own
        self._process.kill()
        self._process.join()
        self._process.close()
        self.connection.close()

    def hear(self) -> tuple[str, Any]:
        """The next message: ``choice``, ``bound``, ``closed``, ``ask``, or the end: ``done`` or ``failed``."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            return "failed", f"its process died (exit code {self._process.exitcode})"
        return str(kind), value

    def tell(self, version: int, choice: Integers | None, bound: float | None) -> None:
        """Answer a question: incumbent and bound, if they are newer than what the lane was told."""
        news = (choice, bound) if version > self._told else None
        self._told = version
        with contextlib.suppress(OSError):  # a lane that just died is heard of next
            self.connection.send(news)

    def close(self, outcome: str, details: Any = None) -> None:
        """Note how it ended."""
        self.summary |= {"outcome": outcome, "wall_s": time.perf_counter() - self._start}
        if details is not None:
            self.summary["details"] = details


def end(lanes: Sequence[Lane]) -> None:
    """End lanes and whatever they have started; nothing of them is left when this returns."""
    for lane in lanes:
        lane.terminate()
    deadline = time.perf_counter() + GRACE_S
    for lane in lanes:
        lane.bury(deadline - time.perf_counter())


# --- in the lane ---------------------------------------------------------------------------------------------------


class _LaneSearch(Search):
    """Hands on what is found, and takes over what others found, whenever the solver looks at the clock."""

    def __init__(self, task: Task, connection: Connection) -> None:
        super().__init__(
            task.problem, solver=task.solver.name, time_limit=task.time_limit, seed=task.seed, initial=task.initial
        )
        self._connection, self._asked, self._parent_bound = connection, -np.inf, -np.inf
        self._unit = task.unit

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
    """Run a task in a lane's process, from its start to its end."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C goes to the parent alone, and what is started here can be ended with it
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        task.solver.prepare()
        search = _LaneSearch(task, connection)
        task.solver.run(task.problem, search)
        connection.send(("done", search.details))
    except (EOFError, BrokenPipeError):
        return  # the parent has gone
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {error}"))


def _leave(*_: Any) -> None:
    raise SystemExit


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
