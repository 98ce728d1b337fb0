"""The state of one run (clock, incumbent, bound, trace), which evaluates every choice and decides the status."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Evaluation, Problem
from solvers.errors import SolverError, described
from solvers.solution import Solution, Status, StopReason, TracePoint, relative_gap

PROOF_TOLERANCE = 1e-9
"""Relative gap between objective and bound that counts as optimal (sums of floats are accurate to about 1e-13)."""

Numbers = float | None | NDArray[np.float64] | Mapping[str, float]
"""Numbers in the unit of an objective (or per unit of a resource), as stored in ``details``."""

Lesson = TypeVar("Lesson")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a running solver as passed to `on_progress`, in the unit of the original problem."""

    solver: str
    t_s: float
    objective: float | None
    bound: float | None
    gap: float | None


OnProgress = Callable[[Progress], None]


class Search:
    """The state of one run: clock, random numbers, incumbent, bound, trace.

    Attributes:
        problem: the problem that is searched; choices, objectives and bounds refer to it.
        choice: ``(G,)`` the incumbent, or None.
        rng: numpy Generator made from the seed; the only source of randomness that a back end may use.
        initial: ``(G,)`` a choice to start from, or None.
        constant: the part of the stated problem's objective that the searched problem leaves out (its offset).
        timing: time in seconds by phase, recorded by the back end through `phase`.
        details: additional results of the back end; numbers of the objective are added through `note`.
        pool: good choices with their objectives in the stated problem's unit.
        clock: function that returns the time in seconds; `solvers.testing` replaces the real one.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        solver: str,
        time_limit: float | None = None,
        seed: int | None = None,
        initial: NDArray[np.int64] | None = None,
        on_progress: OnProgress | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.problem, self.solver, self.constant = problem, solver, 0.0
        self.clock = time.perf_counter if clock is None else clock
        self._start = self.clock()
        self._limit, self._on_progress = time_limit, on_progress
        self._evaluation: Evaluation | None = None
        self._bound: float | None = None
        self._closed = self._proved_infeasible = self._limit_seen = self._part_cut = self._recovered = False
        self._trace: list[TracePoint] = []
        self.choice: NDArray[np.int64] | None = None
        self.seed, self.rng, self.initial = seed, np.random.default_rng(seed), initial
        self._lessons: dict[type[Any], Any] = {}
        self.timing: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.pool: list[tuple[tuple[int, ...], float]] = []

    @property
    def stated(self) -> "Search":
        """The search of the problem that the caller stated."""
        return self

    @property
    def original(self) -> Problem:
        """The problem in its original, unscaled unit, which a back end may store or send to a service."""
        return self.problem

    @property
    def unit(self) -> float:
        """The value of one unit of this problem's objective in units of the stated problem's objective."""
        return 1.0

    def note(self, **numbers: Numbers) -> None:
        """Record numbers of this problem's objective (or prices) in `details`, in the stated problem's unit."""
        self.details |= {name: self.in_stated_unit(value) for name, value in numbers.items()}

    def in_stated_unit(self, numbers: Numbers) -> Any:
        """Convert numbers of this problem's objective (or prices) to the stated problem's unit, as plain JSON."""
        return _times(numbers, self.unit)

    def as_stated(self, objective: float | None) -> float | None:
        """Convert an objective or a bound of this problem to one of the stated problem."""
        return None if objective is None else self.unit * objective + self.constant

    def learn(self, lesson: object) -> None:
        """Store a result about the problem for later solvers of this run, replacing the last one of its type."""
        self._lessons[type(lesson)] = lesson

    def learned(self, kind: type[Lesson]) -> Lesson | None:
        """Return the last stored result of this type, or None."""
        return cast("Lesson | None", self._lessons.get(kind))

    # --- the clock -------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> float | None:
        """The requested time limit in seconds, or None; for services that have their own clock."""
        return self._limit

    def elapsed(self) -> float:
        """Return the time since the start in seconds."""
        return self.clock() - self._start

    def remaining(self) -> float:
        """Return the remaining time in seconds, at least zero; infinite without a time limit."""
        return float("inf") if self._limit is None else max(0.0, self._limit - self.elapsed())

    def share_clock(self, other: "Search") -> None:
        """Take over the clock, the start time and the time limit of ``other``."""
        self.clock, self._start, self._limit = other.clock, other._start, other._limit  # noqa: SLF001 - same class

    def expired(self) -> bool:
        """Whether the time limit is reached. A back end must then stop."""
        if self._limit is not None and self.elapsed() >= self._limit:
            self._limit_seen = True
        return self._limit_seen

    def cut_short(self) -> None:
        """Record that a part of the work was ended by its share of the time limit."""
        self._part_cut = True

    @property
    def cut(self) -> bool:
        """Whether the time limit ended the work or a part of it before the answer was proven."""
        return (self._limit_seen or self._part_cut) and not self.proven()

    def recover(self, error: Exception) -> None:
        """End the run with the best choice so far after an error in external code.

        The stop reason becomes ERROR_RECOVERED, and the details describe the error.

        Raises:
            SolverError: no choice was found before the error.
        """
        message = described(error)
        if self.choice is None:
            raise SolverError(f"solver {self.solver!r} failed before it found a choice: {message}") from error
        self.details["error"] = message
        self._recovered = True

    @contextlib.contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Run a ``with`` block in which the time limit is at most ``seconds`` from now."""
        limit, seen = self._limit, self._limit_seen
        self._limit = min(float("inf") if limit is None else limit, self.elapsed() + seconds)
        try:
            yield
        finally:
            self._part_cut |= self._limit_seen
            self._limit, self._limit_seen = limit, seen

    # --- results ---------------------------------------------------------------------------------------------------

    @property
    def objective(self) -> float | None:
        """The incumbent's objective."""
        return None if self._evaluation is None else self._evaluation.objective

    @property
    def bound(self) -> float | None:
        """The best proven lower bound."""
        return self._bound

    @property
    def gap(self) -> float:
        """The relative gap of incumbent and bound; infinite where it is not defined."""
        gap = relative_gap(self.objective, self.bound)
        return float("inf") if gap is None else gap

    def offer(self, choice: ArrayLike) -> bool:
        """Report a choice ``(G,)``, which is kept if it is feasible and better; return whether it was kept."""
        candidate = np.array(choice, dtype=np.int64)
        evaluation = self.problem.evaluate(candidate)
        if not evaluation.feasible:
            return False
        if self._evaluation is not None and evaluation.objective >= self._evaluation.objective:
            return False
        candidate.flags.writeable = False
        self.choice, self._evaluation = candidate, evaluation
        self._tell()
        return True

    def raise_bound(self, bound: float) -> bool:
        """Report a proven lower bound on the objective, which is kept if it is better; return whether it was kept."""
        value = float(bound)
        if not np.isfinite(value) or (self._bound is not None and value <= self._bound):
            return False
        self._bound = value
        self._tell()
        return True

    def close(self) -> None:
        """Record that every feasible choice was considered: the incumbent is optimal, or no choice is feasible."""
        self._closed = True
        if self._evaluation is None:
            self._proved_infeasible = True
        elif self._bound is None or self._bound < self._evaluation.objective:  # rounding may have raised it above
            self._bound = self._evaluation.objective
        self._tell()

    def doubt(self, error: float) -> None:
        """Withdraw a proof and lower every bound, because rounding errors may have falsified them by ``error``."""
        self._closed = False
        if self._bound is not None:
            self._bound -= error
        self._trace = [
            point if point.bound is None else point._replace(bound=point.bound - error) for point in self._trace
        ]
        self._tell()

    def proven(self) -> bool:
        """Whether the answer is proven: objective and bound meet (to `PROOF_TOLERANCE`), or no choice is feasible."""
        if self._proved_infeasible:
            return True
        if self._evaluation is None or self.choice is None or self._bound is None:
            return False
        return self._evaluation.objective - self._bound <= self.tolerance()

    def tolerance(self) -> float:
        """Return the gap between objective and bound that counts as a proof; infinite without an incumbent.

        It is proportional to the size of the numbers that are summed in the objective.
        """
        if self._evaluation is None or self.choice is None:
            return float("inf")
        problem = self.problem
        costs = problem.cost[problem.flat(self.choice)]
        pair_sum = self._evaluation.objective - problem.offset - costs.sum()
        return PROOF_TOLERANCE * float(np.abs(costs).sum() + abs(pair_sum))

    @property
    def closed(self) -> bool:
        """Whether every feasible choice was considered."""
        return self._closed

    def report(self) -> None:
        """Show that the back end is alive: record the state in the trace and call `on_progress`."""
        self._tell()

    def _shown(self) -> tuple[float | None, float | None]:
        """Objective of the incumbent, and bound, as trace and progress show them."""
        return self.objective, self._bound

    def _tell(self) -> None:
        objective, bound = self._shown()
        point = TracePoint(self.elapsed(), objective, bound)
        if not self._trace or self._trace[-1][1:] != point[1:]:
            self._trace.append(point)
        if self._on_progress is not None:
            gap = relative_gap(objective, bound)
            self._on_progress(Progress(solver=self.solver, t_s=point.t_s, objective=objective, bound=bound, gap=gap))

    def phase(self, name: str) -> "_Phase":
        """Return a ``with`` block whose duration is added to ``timing[name]``."""
        return _Phase(self.timing, name)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _end(self) -> StopReason:
        if self._recovered:
            return StopReason.ERROR_RECOVERED
        return StopReason.TIME_LIMIT if self.cut else StopReason.COMPLETED

    def solution(self, stop_reason: StopReason, options: Mapping[str, Any]) -> Solution:
        """Return the current results as a `Solution`."""
        if stop_reason is StopReason.COMPLETED:
            stop_reason = self._end()
        if self._evaluation is None:
            status = Status.INFEASIBLE if self._proved_infeasible else Status.UNKNOWN
        else:
            status = Status.OPTIMAL if self.proven() else Status.FEASIBLE
        objective = None if self._evaluation is None else self._evaluation.objective
        bound = self._bound
        if bound is not None and objective is not None and (bound > objective or status is Status.OPTIMAL):
            bound = min(bound, objective)  # rounding can raise a proven bound above the optimum
        return Solution(
            choice=self.choice,
            objective=objective,
            usage={} if self._evaluation is None else self._evaluation.usage,
            feasible=self._evaluation is not None,
            bound=bound,
            gap=relative_gap(objective, bound),
            status=status,
            stop_reason=stop_reason,
            wall_s=self.elapsed(),
            timing=dict(self.timing),
            trace=tuple(self._trace),
            solver=self.solver,
            seed=self.seed,
            options=dict(options),
            details=dict(self.details),
            pool=tuple(self.pool),
            problem_fingerprint=self.problem.fingerprint(),
        )


def _times(numbers: Numbers, unit: float) -> Any:
    if numbers is None:
        return None
    if isinstance(numbers, Mapping):
        return {name: unit * number for name, number in numbers.items()}
    return (unit * numbers).tolist() if isinstance(numbers, np.ndarray) else unit * numbers


class _Phase:
    def __init__(self, timing: dict[str, float], name: str) -> None:
        self._timing, self._name = timing, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timing[self._name] = self._timing.get(self._name, 0.0) + time.perf_counter() - self._start


def cheapest(problem: Problem, cost: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """Return each group's option of the least cost (or ``cost`` ``(V,)``), the first of equal ones, as a choice."""
    cost, starts = problem.cost if cost is None else cost, problem.group_offsets[:-1]
    least = np.flatnonzero(cost == np.minimum.reduceat(cost, starts)[problem.group_of])
    return np.asarray(least[np.searchsorted(least, starts)] - starts)


def num_choices(problem: Problem) -> float:
    """Return the number of choices, the product of the groups' sizes, at most 8e307."""
    return float(np.exp(np.minimum(np.log(np.diff(problem.group_offsets)).sum(), 709.0)))
