"""`portfolio`: several solvers at once in processes, with one incumbent and one bound; the first proof ends all.

At most one process per core runs at a time. With more solvers than cores, the next one starts when one has ended
without a proof. When a run is over, for whatever reason, none of its processes is left.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from solvers.base import Search, Solver
from solvers.composites import lanes
from solvers.composites.auto import EXACT_S, plan
from solvers.errors import InvalidOptionError, SolverError, SolverUnavailableError, UnsupportedProblemError
from solvers.kernels.repair import repair
from solvers.kernels.warm import warm
from solvers.run import as_solver
from solvers.search import cheapest

LOOK_S = 0.1
"""Time in seconds between two checks of the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portfolio(Solver):
    """Run several solvers on the problem at the same time; each gets the best choice and bound of all.

    In a script the call belongs below ``if __name__ == "__main__":``, like everything that starts processes.
    ``details["lanes"]`` says how each solver ended. If one solver fails, the others continue.

    Attributes:
        solvers: names or `Solver` instances, or one string of names with commas; by default those that `auto` would
            run one after the other. Solvers that need the network are not allowed.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(9), "portfolio", solvers=("miqp", "anneal")).status  # doctest: +SKIP
    <Status.OPTIMAL: 'OPTIMAL'>
    """

    name: ClassVar[str] = "portfolio"
    summary: ClassVar[str] = "several solvers at once in processes, sharing incumbent and bound; first proof ends all"
    deterministic: ClassVar[bool] = False  # results of other solvers arrive at varying times

    solvers: Sequence[Any] | str = ()

    def __post_init__(self) -> None:
        Solver.__post_init__(self)  # `super` does not work in a dataclass with slots
        names = self.solvers.split(",") if isinstance(self.solvers, str) else self.solvers
        object.__setattr__(self, "solvers", tuple(names))
        for solver in map(as_solver, self.solvers):
            if solver.needs_network:
                raise InvalidOptionError(f"a portfolio runs only locally; {solver.name!r} needs the network")
            if isinstance(solver, Portfolio):
                raise InvalidOptionError("a portfolio cannot be part of a portfolio; name its solvers in one tuple")

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem that no solver of the portfolio can solve."""
        refusals = [_refusal(solver, problem) for solver in self._chosen(problem)]
        return "" if not all(refusals) else f"no solver of the portfolio can run: {'; '.join(refusals)}"

    def refuse_kind(self, *, pairs: bool) -> str:
        """Refuse a kind of problems that no given solver supports."""
        refusals = [solver.why_not() or solver.refuse_kind(pairs=pairs) for solver in map(as_solver, self.solvers)]
        return "" if not refusals or not all(refusals) else f"no solver of the portfolio can run: {'; '.join(refusals)}"

    def prepare(self) -> None:
        """Compile the inner loops here and in the server of the processes."""
        warm()
        lanes.prepare()

    def run(self, problem: Problem, search: Search) -> None:
        """Start the solvers, distribute their results, and end them."""
        if (quick := repair(problem, cheapest(problem), search.expired)) is not None:
            search.offer(quick)  # processes take a moment to start
        chosen = self._chosen(problem)
        refused = {solver.name: why for solver in chosen if (why := _refusal(solver, problem))}
        waiting = [solver for solver in chosen if solver.name not in refused]
        seeds = search.rng.integers(2**31, size=len(waiting)).tolist()
        jobs = [(solver, seed) for solver, seed in zip(waiting, seeds, strict=True)]
        race = _Race(problem, search)
        try:
            while (jobs or race.running) and not search.proven() and not search.expired():
                while jobs and len(race.running) < (os.cpu_count() or 1):
                    race.start(*jobs.pop(0))
                race.listen()
        finally:
            race.end()
            search.details["lanes"] = [lane.summary for lane in race.lanes]
            search.details["refused"] = refused
        if race.lanes and len(race.failed) == len(race.lanes) and not jobs:
            raise SolverError(f"every solver of the portfolio failed: {'; '.join(race.failed)}")

    @property
    def inner(self) -> list[Solver]:
        """The solvers to run; empty if they depend on the problem."""
        return [as_solver(solver) for solver in self.solvers or ()]

    def _chosen(self, problem: Problem) -> list[Solver]:
        return self.inner or [solver for solver, _ in plan(problem)]


class _Race:
    """The lanes of a run, and their shared results."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.lanes: list[lanes.Lane] = []
        self.running: list[lanes.Lane] = []
        self.failed: list[str] = []
        self.version = 0

    def start(self, solver: Solver, seed: int) -> None:
        """Start a solver in a new lane."""
        seconds = self.search.remaining()
        if np.isinf(seconds) and solver.exact and self.problem.pairs:
            seconds = EXACT_S
        limit = None if np.isinf(seconds) else max(seconds, 1e-3)
        search = self.search
        task = lanes.Task(
            solver=solver,
            problem=self.problem,
            time_limit=limit,
            seed=seed,
            initial=search.initial,
            unit=search.unit,
            constant=search.constant,
        )
        lane = lanes.Lane(task)
        self.lanes.append(lane)
        self.running.append(lane)

    def listen(self) -> None:
        """Handle the lanes' messages, or wait briefly for messages."""
        seconds = min(LOOK_S, self.search.remaining())
        heard = wait([lane.connection for lane in self.running], timeout=seconds)
        for lane in [lane for lane in self.running if lane.connection in heard]:
            self._take(lane, *lane.hear())

    def end(self) -> None:
        """End the lanes that are still running."""
        for lane in self.running:
            lane.close("ended by the first proof" if self.search.proven() else "ended when time was up")
        lanes.end(self.lanes)
        self.running = []

    def _take(self, lane: lanes.Lane, kind: str, value: Any) -> None:
        search, before = self.search, (self.search.objective, self.search.bound)
        if kind == "choice":
            search.offer(value)
        elif kind == "bound":
            search.raise_bound(value)
        elif kind == "closed":
            if search.choice is None:
                search.close()
        elif kind == "ask":
            lane.tell(self.version, search.choice, search.bound)
        else:
            self.running.remove(lane)
            if kind == "done":
                lane.close("done", value)
            else:
                lane.close(f"failed: {value}")
                self.failed.append(f"{lane.name}: {value}")
        if before != (search.objective, search.bound):
            self.version += 1


def _refusal(solver: Solver, problem: Problem) -> str:
    try:
        solver.require(problem)
    except (SolverUnavailableError, UnsupportedProblemError) as error:
        return str(error)
    return ""
