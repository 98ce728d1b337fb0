"""Minimise the use of a resource under an upper limit on the objective, with a proven lower bound.

Without pair terms, uses and costs are swapped, and the solver proves the minimum directly: first under a limit that
allows for the rounding of costs, which leaves nothing out, and if its choice is only just above the true limit, again
under a lower one. With pair terms in the objective or in a resource, the budget is found by bisection: an objective
within the limit lowers the sufficient use, a bound above the limit raises the proven lower bound, and an answer with
neither changes nothing. The search for a first choice may take all of the time. The returned choice meets the limit and
all budgets as `Problem.evaluate` computes them, and no such choice uses less than ``at_least``. Ctrl-C ends the whole
search, not only the current solve.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.problem import BUDGET_TOLERANCE, limit_of
from solvers.base import OnProgress, SolverLike
from solvers.errors import InvalidOptionError, NoChoiceError
from solvers.run import as_solver, prepare, solve
from solvers.search import PROOF_TOLERANCE
from solvers.solution import Solution, Status, StopReason
from solvers.validation import require_problem

FILE_KIND = FileKind("qcompress smallest use", version=2)
FIRST_STEPS = (20, 4, 1)  # until a choice is within the limit, a solve gets one of so many parts of the time
FIRST_SHARE = 0.9  # of the time, for the problem whose limit allows for rounding
FINEST = 1e-6  # relative precision for uses that are not whole numbers
LARGEST_WHOLE = 2.0**50  # up to here half of a unit is exact beside whole numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SmallestUse:
    """Result of `smallest_use`.

    Attributes:
        resource: name of the resource.
        at_most: upper limit on the objective.
        choice: ``(G,)`` the choice found.
        objective, usage: objective of the choice, and its use of the resource.
        at_least: proven lower bound on the use; equal to ``usage`` if that is proven to be the smallest.
        stop_reason: INTERRUPTED if Ctrl-C ended the search; TIME_LIMIT if the time did, before the use was proven.
    """

    resource: str
    at_most: float
    choice: NDArray[np.int64]
    objective: float
    usage: float
    at_least: float
    stop_reason: StopReason = StopReason.COMPLETED

    def to_json(self) -> dict[str, Any]:
        """Return the result as a dictionary that JSON can store."""
        numbers = {name: getattr(self, name) for name in ("resource", "at_most", "objective", "usage", "at_least")}
        return {**numbers, "choice": self.choice.tolist(), "stop_reason": str(self.stop_reason)}

    def save(self, path: AnyPath) -> None:
        """Write the result as JSON, atomically."""
        FILE_KIND.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "SmallestUse":
        """Read a result that `save` wrote.

        Raises:
            FileFormatError: the file is incomplete, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            value["stop_reason"] = StopReason(value["stop_reason"])
            return cls(**{**value, "choice": np.array(value["choice"], dtype=np.int64)})


def smallest_use(
    problem: Problem,
    resource: str,
    at_most: float,
    *,
    solver: SolverLike = "auto",
    time_limit: float | None = None,
    seed: int | None = None,
    on_progress: OnProgress | None = None,
) -> SmallestUse:
    """Find the choice with the smallest use and an objective of at most ``at_most``, within the problem's budgets.

    Args:
        problem: groups, options, costs and pair terms; its budgets must be met too.
        resource: name of the resource whose use is minimised.
        at_most: upper limit on the objective.
        solver: the solver, same as in `solve`.
        time_limit: maximum total time in seconds; compiling before the first run does not count.
        seed: random seed, same as in `solve`.
        on_progress: same as in `solve`, for every problem solved on the way.

    Raises:
        InvalidOptionError: the resource is unknown, or the limit is not a finite number.
        InfeasibleBudgetError: no choice is within the limit; the message gives the smallest objective found.
        NoChoiceError: no choice was found within the limit, which does not prove that there is none.
        KeyboardInterrupt: Ctrl-C ended the search before a choice was found.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {})
    >>> found = smallest_use(problem, "bytes", 2.0)
    >>> found.choice.tolist(), found.usage, found.at_least
    ([0, 1], 12.0, 12.0)
    """
    require_problem(problem, "smallest_use")
    if resource not in problem.resources:
        raise InvalidOptionError(f"no resource is called {resource!r}; there are: {', '.join(problem.resources)}")
    if not math.isfinite(at_most):
        raise InvalidOptionError(f"at_most must be a finite number, found {at_most!r}")
    search = _Search(problem, resource, at_most, solver, time_limit, seed, on_progress)
    return search.bisected() if problem.pairs or problem.resource_pairs else search.swapped()


class _Search:
    """The best choice so far, and the proven lower bound."""

    def __init__(
        self,
        problem: Problem,
        resource: str,
        at_most: float,
        solver: SolverLike,
        time_limit: float | None,
        seed: int | None,
        on_progress: OnProgress | None,
    ) -> None:
        self._problem, self._resource, self._at_most = problem, resource, at_most
        self._settings: dict[str, Any] = {"seed": seed, "on_progress": on_progress}
        self._solver = as_solver(solver)
        numbers = [problem.resources[resource], np.array([problem.fixed.get(resource, 0.0)])]
        numbers += [problem.resource_pairs[resource].data] if resource in problem.resource_pairs else []
        self._largest = float(np.maximum.reduceat(problem.resources[resource], problem.group_offsets[:-1]).sum())
        self._largest += float(sum(values.sum() for values in numbers[1:]))
        self._whole = all((values == np.floor(values)).all() for values in numbers) and self._largest < LARGEST_WHOLE
        self._at_least = problem.minimum_usage()[resource]
        self._best: SmallestUse | None = None
        self._impossible = False  # proven: no choice is within the limit
        self._stops: list[StopReason] = []
        limited = problem.with_budgets(**{resource: self._largest})
        self._solver.require_kind(pairs=bool(problem.pairs), paired_budgets=limited.paired_budgets)
        prepare(self._solver, limited)
        self._deadline = None if time_limit is None else time.perf_counter() + time_limit

    def swapped(self) -> SmallestUse:
        """Solve without pair terms: uses become costs, and costs (minus each group's smallest) become a resource."""
        problem = self._problem
        least = np.minimum.reduceat(problem.cost, problem.group_offsets[:-1])
        lowest = math.fsum([problem.offset, *least.tolist()])
        room = math.fsum([self._limit(), -problem.offset, *(-least).tolist()])
        sizes = abs(self._limit()) + 2.0 * (abs(problem.offset) + float(np.abs(least).sum()))
        rounding = float(np.finfo(float).eps) * (16.0 + 4.0 * math.sqrt(problem.num_groups)) * sizes
        if room + rounding < 0:
            self._impossible = True
            raise self._nothing(lowest)
        above = problem.cost - least[problem.group_of]
        solution = self._solved(above, room + rounding, FIRST_SHARE)
        self._impossible = solution.choice is None and solution.status is Status.INFEASIBLE
        if solution.bound is not None:
            self._raise(solution.bound * (1 - BUDGET_TOLERANCE))
        if solution.choice is not None and not self._offer(solution.choice) and not self._interrupted():
            solution = self._solved(above, room - rounding, 1.0)
        if solution.choice is None or not self._offer(solution.choice):
            raise self._nothing(None)
        return self._found()

    def _solved(self, above: NDArray[np.float64], room: float, share: float) -> Solution:
        """Solve with uses and costs swapped, in a share of the remaining time."""
        left = self._left(1)
        seconds = None if left is None else share * left
        return self._solve(self._swapped(above, max(room, 0.0)), seconds)

    def _swapped(self, above: NDArray[np.float64], room: float) -> Problem:
        """Return the problem with the uses as costs, and with a budget ``room`` for the costs ``above`` the least."""
        problem, objective = self._problem, "objective"
        while objective in problem.resources:
            objective += "'"
        return Problem(
            problem.groups,
            problem.options,
            problem.resources[self._resource],
            {**problem.resources, objective: above},
            {**problem.budgets, objective: room},
            offset=problem.fixed.get(self._resource, 0.0),
            fixed=problem.fixed,
        )

    def bisected(self) -> SmallestUse:
        """Solve with pair terms: minimise the objective at one budget after another."""
        budget = self._problem.budgets.get(self._resource, self._largest)
        budget = float(math.floor(limit_of(budget))) if self._whole else budget
        reached = self._first(min(self._largest, budget))
        if self._best is None:
            raise self._nothing(reached)
        try:
            self._bisect()
        except KeyboardInterrupt:  # outside the solver, which handles it by itself
            self._stops.append(StopReason.INTERRUPTED)
        return self._found()

    def _first(self, budget: float) -> float | None:
        """Find a first choice within the limit, in as much of the time as that takes.

        Returns:
            None if one was found, else the smallest objective found.
        """
        start, reached = None, math.inf
        for steps in FIRST_STEPS:
            solution = self._within(budget, steps, start)
            missed = self._missed(budget, solution)
            if missed is None:
                return None
            if missed < reached:
                start, reached = solution.choice, missed
            if not self._cut() or self._impossible or self._expired():
                break
        return reached

    def _bisect(self) -> None:
        """Halve the range between the best choice's use and the bound until one unit is left."""
        assert self._best is not None  # noqa: S101 - the caller found one
        lowest = self._at_least
        unreached = lowest - 1.0
        if not self._expired() and not self._try(lowest, steps=20):
            unreached = lowest
        while not self._expired():
            below = max(unreached, self._at_least - 1.0 if self._whole else self._at_least)
            width, unit = self._best.usage - below, 1.0 if self._whole else FINEST * self._best.usage
            if width <= unit:
                break
            budget = below + width / 2
            budget = float(math.floor(budget)) if self._whole else budget
            if not self._try(budget, steps=math.ceil(math.log2(width / unit)) + 1):
                unreached = budget

    def _try(self, budget: float, *, steps: int) -> bool:
        """Return whether a choice within the limit is found that uses at most ``budget``, whole if all uses are."""
        best = self._best
        if best is not None and best.usage <= budget:
            return True
        return self._missed(budget, self._within(budget, steps)) is None

    def _within(self, budget: float, steps: int, initial: NDArray[np.int64] | None = None) -> Solution:
        """Solve for uses of at most ``budget``, in one of ``steps`` parts of the remaining time."""
        # no use in whole numbers above the budget is within its tolerance, which is above 1 beyond 1e12
        stated = min(budget, (budget + 0.5) / (1 + BUDGET_TOLERANCE)) if self._whole else budget
        return self._solve(self._problem.with_budgets(**{self._resource: stated}), self._left(steps), initial)

    def _missed(self, budget: float, solution: Solution) -> float | None:
        """Keep what was found or proven for a budget; return the objective that misses the limit, None if none does."""
        if solution.choice is not None and self._offer(solution.choice):
            return None
        proven = solution.bound is not None and solution.bound > self._limit() + self._uncertainty(solution)
        if proven or (solution.choice is None and solution.status is Status.INFEASIBLE):
            self._impossible = self._best is None
            self._raise(math.floor(budget) + 1.0 if self._whole else budget)
        return math.inf if solution.objective is None else solution.objective

    def _solve(self, stated: Problem, seconds: float | None, initial: NDArray[np.int64] | None = None) -> Solution:
        solution: Solution = solve(stated, self._solver, time_limit=seconds, initial=initial, **self._settings)
        self._stops.append(solution.stop_reason)
        return solution

    def _uncertainty(self, solution: Solution) -> float:
        """Return by how much a bound may exceed the true optimum: bounds are proofs up to `PROOF_TOLERANCE`."""
        constant = self._problem.offset
        if solution.choice is None or solution.objective is None:
            return PROOF_TOLERANCE * abs((solution.bound or constant) - constant)
        costs = self._problem.cost[self._problem.flat(solution.choice)]
        pairs = solution.objective - constant - float(costs.sum())
        return PROOF_TOLERANCE * (float(np.abs(costs).sum()) + abs(pairs))

    def _offer(self, choice: NDArray[np.int64]) -> bool:
        """Keep a choice if it is within the limit and the budgets; return whether it is."""
        evaluation = self._problem.evaluate(choice)
        if not evaluation.feasible or evaluation.objective > self._limit():
            return False
        usage = evaluation.usage[self._resource]
        if self._best is None or usage < self._best.usage:
            self._best = SmallestUse(
                resource=self._resource,
                at_most=self._at_most,
                choice=choice,
                objective=evaluation.objective,
                usage=usage,
                at_least=self._at_least,
            )
        return True

    def _found(self) -> SmallestUse:
        best = self._best
        assert best is not None  # noqa: S101
        values = {name: getattr(best, name) for name in ("resource", "at_most", "choice", "objective", "usage")}
        at_least, stop_reason = min(self._at_least, best.usage), StopReason.COMPLETED
        if self._interrupted():
            stop_reason = StopReason.INTERRUPTED
        elif at_least < best.usage and (StopReason.TIME_LIMIT in self._stops or self._expired()):
            stop_reason = StopReason.TIME_LIMIT
        return SmallestUse(**values, at_least=at_least, stop_reason=stop_reason)

    def _raise(self, at_least: float) -> None:
        """Raise the proven lower bound, rounded up if all uses are whole numbers."""
        value = math.ceil(at_least - min(PROOF_TOLERANCE * abs(at_least), 0.5)) if self._whole else at_least
        self._at_least = max(self._at_least, float(value))

    def _limit(self) -> float:
        return limit_of(self._at_most)

    def _left(self, steps: int) -> float | None:
        """Return the time in seconds for the next of ``steps`` solves."""
        return None if self._deadline is None else max((self._deadline - time.perf_counter()) / steps, 0.01)

    def _interrupted(self) -> bool:
        return StopReason.INTERRUPTED in self._stops

    def _cut(self) -> bool:
        """Whether the time limit ended the last solve."""
        return self._deadline is not None and self._stops[-1] is StopReason.TIME_LIMIT

    def _expired(self) -> bool:
        return self._interrupted() or (self._deadline is not None and time.perf_counter() >= self._deadline)

    def _nothing(self, reached: float | None) -> BaseException:
        """Return the error for a search without a choice; it says nothing about the limit if Ctrl-C ended it."""
        if self._interrupted():
            return KeyboardInterrupt()
        came = "" if reached is None or math.isinf(reached) else f"; the smallest found is {reached:.6g}"
        error: InfeasibleBudgetError | NoChoiceError
        if self._impossible:
            error = InfeasibleBudgetError(
                f"no choice within the budgets has an objective of at most {self._at_most:g}{came}"
            )
        else:
            when, more = (" before the time ended", "allow more time, ") if self._cut() else ("", "")
            error = NoChoiceError(
                f"no choice within the budgets with an objective of at most {self._at_most:g} was found{when}, which "
                f"does not prove that there is none{came}; {more}raise the limit or take another solver"
            )
        error.problem = self._problem
        return error
