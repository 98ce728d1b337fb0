"""The contract between `solve` and a back end.

A back end is a frozen dataclass derived from `Solver`: its fields are its options (so they can be listed, checked
and pickled), its class attributes say what it can do, and its one method `run(problem, search)` does the work.

The back end never judges itself. It hands choices to ``search.offer`` and proven lower bounds to
``search.raise_bound``; `Search` has every choice judged by `Problem.evaluate`, keeps the incumbent, the trace and
the clock, and alone decides the status. What a back end sees is a problem whose objective numbers are scaled to
about 1; `Search` scales back.
"""

import contextlib
import dataclasses
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Evaluation, Problem
from solvers.errors import InvalidOptionError, SolverError, SolverUnavailableError, UnsupportedProblemError
from solvers.solution import Solution, Status, StopReason, TracePoint

if TYPE_CHECKING:
    from solvers.bounds.dual import DualBound

PROOF_TOLERANCE = 1e-9
"""Relative distance of objective and bound that counts as proven optimal (sums of floats are good to about 1e-13)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo:
    """What a back end is and can do; ``options`` maps each option to its default."""

    name: str
    summary: str
    available: bool
    why_not: str
    exact: bool
    native_constraints: bool
    native_pairs: bool
    needs_network: bool
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What `on_progress` is told: the state of a running solver, in the problem's own unit."""

    solver: str
    t_s: float
    objective: float | None
    bound: float | None
    gap: float | None


OnProgress = Callable[[Progress], None]


class Solver(ABC):
    """One back end. Subclasses are frozen dataclasses; their fields are their options and all have defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool] = False  # proves optimality when given the time
    native_constraints: ClassVar[bool] = True  # takes budgets as they are (no penalty)
    native_pairs: ClassVar[bool] = True  # takes pair terms
    needs_network: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True  # same seed, same answer when no time limit cuts it
    honours_time_limit: ClassVar[bool] = True  # ends in time; False only where foreign code cannot be stopped
    presolved: ClassVar[bool] = True  # may see the problem reduced; False where it must see it as it was stated
    requires: ClassVar[tuple[str, ...]] = ()  # modules it imports when it runs
    extra: ClassVar[str] = ""  # what installs them: pip install 'qcompress[extra]'

    @abstractmethod
    def run(self, problem: Problem, search: "Search") -> None:
        """Search ``problem`` until done or ``search.expired()``, telling ``search`` what is found."""

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> Any:  # noqa: ARG002
        """Send ``problem`` to a service and give its job at once, where the back end is one (see `solvers.leap`).

        Raises:
            InvalidOptionError: the back end runs on this machine.
        """
        raise InvalidOptionError(f"solver {self.name!r} runs here and has no jobs; wait=False is for the leap solvers")

    def prepare(self) -> None:  # noqa: B027 - most back ends have nothing to prepare
        """Compile or load what a run needs. `solve` calls it before the clock starts."""

    def refuse(self, problem: Problem) -> str:
        """Why this back end cannot take ``problem`` and which can, or an empty string."""
        if problem.pairs and not self.native_pairs:
            return (
                f"solver {self.name!r} takes no pair terms; use 'auto', 'anneal' or 'milp', "
                "or formulate with pairs=False"
            )
        return ""

    def require(self, problem: Problem) -> None:
        """Raise what keeps this back end from running on ``problem``.

        Raises:
            SolverUnavailableError: a package is missing.
            UnsupportedProblemError: this kind or size of problem is beyond it.
        """
        if why := self.why_not():
            raise SolverUnavailableError(why)
        if why := self.refuse(problem):
            raise UnsupportedProblemError(why)

    @classmethod
    def why_not(cls) -> str:
        """What is missing to use this back end, or an empty string. Imports nothing."""
        missing = [module for module in cls.requires if importlib.util.find_spec(module.split(".")[0]) is None]
        if not missing:
            return ""
        package = f"qcompress[{cls.extra}]" if cls.extra else "qcompress"
        return f"solver {cls.name!r} needs {', '.join(missing)}: pip install '{package}'"

    @classmethod
    def info(cls) -> SolverInfo:
        """The back end's description."""
        why_not = cls.why_not()
        return SolverInfo(
            name=cls.name,
            summary=cls.summary,
            available=not why_not,
            why_not=why_not,
            exact=cls.exact,
            native_constraints=cls.native_constraints,
            native_pairs=cls.native_pairs,
            needs_network=cls.needs_network,
            options=cls.option_defaults(),
        )

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Option name → default."""
        return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """Its name, with the options that differ from their defaults."""
        defaults = self.option_defaults()
        changed = [f"{name}={value!r}" for name, value in self.option_values.items() if value != defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @property
    def option_values(self) -> dict[str, Any]:
        """Option name → this instance's value."""
        return {name: getattr(self, name) for name in self.option_defaults()}


class Search:
    """The state of one run: clock, random numbers, incumbent, bound, trace. In scaled units for the back end.

    Attributes:
        rng: numpy Generator made from the seed; the only source of randomness a back end may use.
        initial: ``(G,)`` a choice to start from, or None.
        at_least: ``(V,)``, scaled: a choice that takes option v and is better than the incumbent has an objective of
            at least ``at_least[v]``; None while nothing is known.
        certified: of how many options the part was that `solvers.heuristic.lagrangian.certify` last looked at.
        timing: seconds by phase, filled by the back end through `phase`.
        details: what the back end wants to tell.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        solver: str,
        scale: float = 1.0,
        time_limit: float | None = None,
        seed: int | None = None,
        initial: NDArray[np.int64] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self._problem, self._scale, self._solver = problem, scale, solver
        self._start = time.perf_counter()
        self._limit, self._on_progress = time_limit, on_progress
        self._evaluation: Evaluation | None = None
        self._bound: float | None = None
        self._proved_infeasible = self._limit_seen = self._part_cut = self._recovered = False
        self._trace: list[TracePoint] = []
        self.choice: NDArray[np.int64] | None = None
        self.seed, self.rng, self.initial = seed, np.random.default_rng(seed), initial
        self.at_least: NDArray[np.float64] | None = None
        self.dual: tuple[Problem, DualBound] | None = None  # kept by `raise_dual_bound`, so that none is found twice
        self.certified = 0
        self.timing: dict[str, float] = {}
        self.details: dict[str, Any] = {}
        self.pool: list[tuple[tuple[int, ...], float]] = []

    @property
    def original(self) -> Problem:
        """The problem as it was stated, its objective not scaled: what a back end may store or send on."""
        return self._problem

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
            raise SolverError(f"solver {self._solver!r} failed before it found a choice: {said}") from error
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
        """The incumbent's objective, scaled."""
        return None if self._evaluation is None else self._evaluation.objective * self._scale

    @property
    def bound(self) -> float | None:
        """The best proven lower bound, scaled."""
        return None if self._bound is None else self._bound * self._scale

    def unscaled(self, number: float) -> float:
        """A scaled objective or price in the problem's own unit, for `details`."""
        return number / self._scale

    def offer(self, choice: ArrayLike) -> bool:
        """Hand in a choice ``(G,)``; it is judged, and kept when feasible and better. True when it was kept."""
        candidate = np.array(choice, dtype=np.int64)
        evaluation = self._problem.evaluate(candidate)
        if not evaluation.feasible:
            return False
        if self._evaluation is not None and evaluation.objective >= self._evaluation.objective:
            return False
        candidate.flags.writeable = False
        self.choice, self._evaluation = candidate, evaluation
        self.report()
        return True

    def raise_bound(self, bound: float) -> None:
        """Hand in a proven lower bound on every feasible choice's objective (scaled); the best one is kept."""
        value = bound / self._scale
        if np.isfinite(value) and (self._bound is None or value > self._bound):
            self._bound = value
            self.report()

    def raise_option_bounds(self, at_least: NDArray[np.float64]) -> None:
        """Hand in proven bounds of single options ``(V,)`` (scaled); the best ones are kept."""
        self.at_least = at_least if self.at_least is None else np.maximum(self.at_least, at_least)

    def close(self) -> None:
        """Every feasible choice was considered: the incumbent is optimal, or without one nothing is feasible."""
        if self._evaluation is None:
            self._proved_infeasible = True
        elif self._bound is None or self._bound < self._evaluation.objective:  # rounding may have put it above
            self._bound = self._evaluation.objective
        self.report()

    def proven(self) -> bool:
        """Whether nothing is left to do: objective and bound meet (to `PROOF_TOLERANCE`), or nothing is feasible."""
        if self._proved_infeasible:
            return True
        if self._evaluation is None or self.choice is None or self._bound is None:
            return False
        return self._evaluation.objective - self._bound <= PROOF_TOLERANCE * self._magnitude(self.choice)

    def _magnitude(self, choice: NDArray[np.int64]) -> float:
        """The size of the numbers whose sum the objective is: what a relative tolerance must relate to."""
        assert self._evaluation is not None  # noqa: S101
        problem = self._problem
        costs = problem.cost[problem.flat(choice)]
        pair_sum = self._evaluation.objective - problem.offset - costs.sum()
        return float(np.abs(costs).sum() + abs(pair_sum))

    def report(self) -> None:
        """Note the state in the trace and tell `on_progress`. Back ends may call it to show that they live."""
        objective = None if self._evaluation is None else self._evaluation.objective
        point = TracePoint(self.elapsed(), objective, self._bound)
        if not self._trace or self._trace[-1][1:] != point[1:]:
            self._trace.append(point)
        if self._on_progress is not None:
            gap = relative_gap(objective, self._bound)
            self._on_progress(
                Progress(solver=self._solver, t_s=point.t_s, objective=objective, bound=self._bound, gap=gap)
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
            solver=self._solver,
            seed=self.seed,
            options=dict(options),
            details=dict(self.details),
            pool=tuple(self.pool),
            problem_fingerprint=self._problem.fingerprint(),
        )


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
