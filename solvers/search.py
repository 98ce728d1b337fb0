"""The search of a problem: its clock, incumbent, bound and trace; and the search of what a reduction makes of it.

A `Search` judges every choice by `Problem.evaluate` and alone decides the status. A `SubSearch` is the search of a
reduction's problem (scaled, a part, what presolve leaves): it hands what is found there back to the search it stands
in, lifted, where it is judged again. So whoever solves a problem does no arithmetic about where it came from.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Evaluation, Problem
from formulations.reductions.base import Reduction
from solvers.errors import SolverError
from solvers.solution import Solution, Status, StopReason, TracePoint

PROOF_TOLERANCE = 1e-9
"""Relative distance of objective and bound that counts as proven optimal (sums of floats are good to about 1e-13)."""

Numbers = float | None | NDArray[np.float64] | Mapping[str, float]
"""Numbers in the unit of an objective (or per unit of a resource), as details may hold them."""

Lesson = TypeVar("Lesson")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What `on_progress` is told: the state of a running solver, in the problem's own unit."""

    solver: str
    t_s: float
    objective: float | None
    bound: float | None
    gap: float | None


OnProgress = Callable[[Progress], None]


class Search:
    """The state of one run: clock, random numbers, incumbent, bound, trace.

    Attributes:
        problem: what is searched; choices, objectives and bounds are in its terms.
        choice: ``(G,)`` the incumbent, or None.
        rng: numpy Generator made from the seed; the only source of randomness a back end may use.
        initial: ``(G,)`` a choice to start from, or None.
        timing: seconds by phase, filled by the back end through `phase`.
        details: what the back end wants to tell; numbers of the objective go there through `note`.
        pool: good choices with their objectives in the stated problem's unit.
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
    ) -> None:
        self.problem, self.solver = problem, solver
        self._start = time.perf_counter()
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
        """The search of the problem as the caller stated it."""
        return self

    @property
    def original(self) -> Problem:
        """The problem in its own unit, not scaled: what a back end may store or send on."""
        return self.problem

    @property
    def unit(self) -> float:
        """How much of the stated problem's objective one unit of this problem's objective is."""
        return 1.0

    def note(self, **numbers: Numbers) -> None:
        """Write numbers of this problem's objective (or prices) to `details`, in the stated problem's unit."""
        for name, value in numbers.items():
            self.details[name] = _times(value, self.unit)

    def learn(self, lesson: object) -> None:
        """Keep what was learned about the problem for later solvers of this run, in place of the last of its kind."""
        self._lessons[type(lesson)] = lesson

    def learned(self, kind: type[Lesson]) -> Lesson | None:
        """What was last learned of this kind, or None."""
        return cast("Lesson | None", self._lessons.get(kind))

    # --- the clock -------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> float | None:
        """The time limit as it was asked, in seconds, or None: for services that keep a clock of their own."""
        return self._limit

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def remaining(self) -> float:
        """Seconds left, not below zero; infinite without a time limit."""
        return float("inf") if self._limit is None else max(0.0, self._limit - self.elapsed())

    def expired(self) -> bool:
        """Whether the time limit has come. A back end that sees True must stop."""
        if self._limit is not None and self.elapsed() >= self._limit:
            self._limit_seen = True
        return self._limit_seen

    def cut_short(self) -> None:
        """A part of the work was ended by its share of the time: what is left open is due to the time limit."""
        self._part_cut = True

    @property
    def cut(self) -> bool:
        """Whether time ended the work or a part of it before the answer was proven."""
        return (self._limit_seen or self._part_cut) and not self.proven()

    def recover(self, error: Exception) -> None:
        """Foreign code failed: the run ends with the best so far, says ERROR_RECOVERED and what the error was.

        Raises:
            SolverError: there is no choice yet that could be kept.
        """
        said = f"{type(error).__name__}: {error}"
        if self.choice is None:
            raise SolverError(f"solver {self.solver!r} failed before it found a choice: {said}") from error
        self.details["error"] = said
        self._recovered = True

    @contextlib.contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """A ``with`` block in which the time limit is at most ``seconds`` from now."""
        limit, seen = self._limit, self._limit_seen
        self._limit = min(float("inf") if limit is None else limit, self.elapsed() + seconds)
        try:
            yield
        finally:
            self._part_cut |= self._limit_seen
            self._limit, self._limit_seen = limit, seen

    # --- what is found ---------------------------------------------------------------------------------------------

    @property
    def objective(self) -> float | None:
        """The incumbent's objective."""
        return None if self._evaluation is None else self._evaluation.objective

    @property
    def bound(self) -> float | None:
        """The best proven lower bound."""
        return self._bound

    def offer(self, choice: ArrayLike) -> bool:
        """Hand in a choice ``(G,)``; it is judged, and kept when feasible and better. True when it was kept."""
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
        """Hand in a proven lower bound on every feasible choice's objective; kept when better. True when it was."""
        value = float(bound)
        if not np.isfinite(value) or (self._bound is not None and value <= self._bound):
            return False
        self._bound = value
        self._tell()
        return True

    def close(self) -> None:
        """Every feasible choice was considered: the incumbent is optimal, or without one nothing is feasible."""
        self._closed = True
        if self._evaluation is None:
            self._proved_infeasible = True
        elif self._bound is None or self._bound < self._evaluation.objective:  # rounding may have put it above
            self._bound = self._evaluation.objective
        self._tell()

    def proven(self) -> bool:
        """Whether nothing is left to do: objective and bound meet (to `PROOF_TOLERANCE`), or nothing is feasible."""
        if self._proved_infeasible:
            return True
        if self._evaluation is None or self.choice is None or self._bound is None:
            return False
        return self._evaluation.objective - self._bound <= self.tolerance()

    def tolerance(self) -> float:
        """The distance of objective and bound that counts as a proof; infinite while there is no incumbent.

        It is relative to the size of the numbers whose sum the objective is.
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
        """Show that the back end lives: note the state in the trace and tell `on_progress`."""
        self._tell()

    def _tell(self) -> None:
        objective = None if self._evaluation is None else self._evaluation.objective
        point = TracePoint(self.elapsed(), objective, self._bound)
        if not self._trace or self._trace[-1][1:] != point[1:]:
            self._trace.append(point)
        if self._on_progress is not None:
            gap = relative_gap(objective, self._bound)
            self._on_progress(
                Progress(solver=self.solver, t_s=point.t_s, objective=objective, bound=self._bound, gap=gap)
            )

    def phase(self, name: str) -> "_Phase":
        """A ``with`` block whose seconds are added to ``timing[name]``."""
        return _Phase(self.timing, name)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _end(self) -> StopReason:
        if self._recovered:
            return StopReason.ERROR_RECOVERED
        return StopReason.TIME_LIMIT if self.cut else StopReason.COMPLETED

    def solution(self, stop_reason: StopReason, options: Mapping[str, Any]) -> Solution:
        """What is known now, as a `Solution`."""
        if stop_reason is StopReason.COMPLETED:
            stop_reason = self._end()
        if self._evaluation is None:
            status = Status.INFEASIBLE if self._proved_infeasible else Status.UNKNOWN
        else:
            status = Status.OPTIMAL if self.proven() else Status.FEASIBLE
        objective = None if self._evaluation is None else self._evaluation.objective
        bound = self._bound
        if bound is not None and objective is not None and (bound > objective or status is Status.OPTIMAL):
            bound = min(bound, objective)  # rounding alone can put a proven bound above the optimum
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


class SubSearch(Search):
    """The search of a reduction's problem on behalf of another search, which gets every choice and bound, lifted.

    It ends when that one does, or when its own time is over. Unless ``apart``, it is a part of the same run: it uses
    its random numbers and clock and adds to its timing, its details and, where choices are the same, its pool.

    Args:
        reduction: from the outer search's problem to the one that is searched here.
        outer: the search that it works for.
        seconds: maximum time from now on; None: the outer search's clock.
        initial: ``(G',)`` a choice to start from.
        apart: whether it is a run of its own, with its own random numbers, details, timing and pool.
        seed: for a run of its own.
        solver: for a run of its own, what runs.
        shares: how many such searches together must prove what the outer search wants proven.
    """

    def __init__(
        self,
        reduction: Reduction,
        outer: Search,
        *,
        seconds: float | None = None,
        initial: NDArray[np.int64] | None = None,
        apart: bool = False,
        seed: int | None = None,
        solver: str | None = None,
        shares: int = 1,
    ) -> None:
        allowed = min(outer.remaining(), float("inf") if seconds is None else seconds)
        super().__init__(
            reduction.problem,
            solver=outer.solver if solver is None else solver,
            time_limit=None if np.isinf(allowed) else max(allowed, 1e-9),
            seed=seed if apart else outer.seed,
            initial=initial,
        )
        self.reduction, self.outer, self._shares, self._seconds = reduction, outer, shares, seconds
        if seconds is None and not apart:
            self._start, self._limit = outer._start, outer._limit
        if not apart:
            self.rng, self.timing, self.details = outer.rng, outer.timing, outer.details
            if reduction.same_choices:
                self.pool = outer.pool

    @property
    def stated(self) -> Search:
        """The search of the problem as the caller stated it."""
        return self.outer.stated

    @property
    def original(self) -> Problem:
        """The problem in its own unit, not scaled."""
        return self.outer.original if self.reduction.same_choices else self.problem

    @property
    def unit(self) -> float:
        """How much of the stated problem's objective one unit of this problem's objective is."""
        return self.outer.unit * self.reduction.unit

    @property
    def limit(self) -> float | None:
        """The time limit as it was asked, in seconds, or None."""
        return self.outer.limit if self._seconds is None else self._limit

    def expired(self) -> bool:
        """Whether the time of this search, or of the outer one, is over."""
        return self.outer.expired() or super().expired()

    def proven(self) -> bool:
        """Whether nothing is left to do, here or outside."""
        return self.outer.proven() or (not self.reduction.complete and super().proven())

    def tolerance(self) -> float:
        """No more than its share of the outer search's: or all parts could be proven and the whole not."""
        return min(super().tolerance(), self.outer.tolerance() / (self.reduction.unit * self._shares))

    def begin_from(self, choice: ArrayLike) -> None:
        """Take a choice for the incumbent that the outer search knows already."""
        super().offer(choice)

    def offer(self, choice: ArrayLike) -> bool:
        """Judge a choice, keep it when it is better, and hand it on."""
        kept = super().offer(choice)
        if kept and not self.outer.offer(self.reduction.lift(choice)):
            self.outer.report()
        return kept

    def raise_bound(self, bound: float) -> bool:
        """Keep a proven bound and hand on what follows from it."""
        kept = super().raise_bound(bound)
        if kept and not self.outer.raise_bound(self.reduction.lift_bound(float(bound))):
            self.outer.report()
        return kept

    def close(self) -> None:
        """Every feasible choice was considered; so the outer search is closed, or at least has a bound."""
        super().close()
        if self.reduction.complete and (self.choice is None or self.outer.choice is not None):
            self.outer.close()
        elif self.bound is not None:
            self.outer.raise_bound(self.reduction.lift_bound(self.bound))

    def recover(self, error: Exception) -> None:
        """Keep what is known after an error; the outer search ends with it as well."""
        super().recover(error)
        self.outer.recover(error)

    def report(self) -> None:
        """Show that the back end lives."""
        super().report()
        self.outer.report()

    def summary(self) -> dict[str, Any]:
        """What was found here, objectives in the stated problem's unit, for the outer search's details."""
        values = {"objective": self.objective, "bound": self.bound}
        known = {name: _times(value, self.unit) for name, value in values.items()}
        return {"solver": self.solver, "seed": self.seed, **known, "wall_s": self.elapsed(), "details": self.details}


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


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """``(objective - bound) / |objective|``, 0 when they meet, None when one is missing or the objective is 0."""
    if objective is None or bound is None:
        return None
    if objective <= bound:
        return 0.0
    return (objective - bound) / abs(objective) if objective != 0 else None
