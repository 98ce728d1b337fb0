"""The other direction: the smallest use of a resource with an objective of at most so much, and what is proven of it.

Where options add up, uses and costs trade places and the solver proves the smallest use itself. With pair terms the
budget is bisected: an objective within the limit lowers the use that is known to be enough, a bound above it raises
the use that is proven to be needed, and an answer with neither decides nothing that is claimed. What always holds: the
choice meets the limit and the other budgets as `Problem.evaluate` judges it, and no choice that does uses less than
``at_least``.
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
from formulations.problem import BUDGET_TOLERANCE
from solvers.base import OnProgress, SolverLike
from solvers.errors import InvalidOptionError
from solvers.run import solve

FILE_KIND = FileKind("qcompress smallest use", version=1)
FINEST = 1e-6  # of uses that do not come in whole numbers, relative
_OBJECTIVE = "objective"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SmallestUse:
    """What `smallest_use` finds.

    Attributes:
        resource: whose use is small.
        at_most: the limit of the objective.
        choice: ``(G,)``.
        objective, usage: of the choice.
        at_least: no choice within the limit uses less; equal to ``usage`` where that is proven to be the smallest.
    """

    resource: str
    at_most: float
    choice: NDArray[np.int64]
    objective: float
    usage: float
    at_least: float

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        numbers = {name: getattr(self, name) for name in ("resource", "at_most", "objective", "usage", "at_least")}
        return {**numbers, "choice": self.choice.tolist()}

    def save(self, path: AnyPath) -> None:
        """Write everything as JSON, whole or not at all."""
        FILE_KIND.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "SmallestUse":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is not whole, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
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
    """The choice of smallest use whose objective is at most ``at_most``, within the budgets of ``problem``.

    Args:
        problem: groups, options, costs and pair terms; its budgets hold too.
        resource: whose use is to be small.
        at_most: limit of the objective.
        solver: as in `solve`.
        time_limit: seconds for everything.
        seed: as in `solve`.
        on_progress: as in `solve`, for every problem that is solved on the way.

    Raises:
        InvalidOptionError: an unknown resource, or a limit that is no number.
        InfeasibleBudgetError: no choice was found within the limit; says how far the objective came down.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {})
    >>> found = smallest_use(problem, "bytes", 2.0)
    >>> found.choice.tolist(), found.usage, found.at_least
    ([0, 1], 12.0, 12.0)
    """
    if resource not in problem.resources:
        raise InvalidOptionError(f"no resource is called {resource!r}; there are: {', '.join(problem.resources)}")
    if problem.resource_pairs:
        paired = ", ".join(problem.resource_pairs)
        raise InvalidOptionError(
            f"smallest_use takes no resources with pair terms, this problem has some in {paired}; solve it for several "
            "budgets instead"
        )
    if not math.isfinite(at_most):
        raise InvalidOptionError(f"at_most must be a finite number, found {at_most!r}")
    search = _Search(problem, resource, at_most, solver, time_limit, seed, on_progress)
    return search.bisected() if problem.pairs else search.swapped()


class _Search:
    """The choice so far and what is proven."""

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
        self._solver = solver
        self._deadline = None if time_limit is None else time.perf_counter() + time_limit
        use = problem.resources[resource]
        self._whole = bool((use == np.floor(use)).all()) and float(problem.fixed.get(resource, 0.0)).is_integer()
        self._at_least = problem.minimum_usage()[resource]
        self._best: SmallestUse | None = None

    def swapped(self) -> SmallestUse:
        """Without pair terms: uses as costs, costs (from each group's least) as a resource."""
        problem = self._problem
        least = np.minimum.reduceat(problem.cost, problem.group_offsets[:-1])
        room = self._at_most - problem.offset - float(least.sum())
        if room < 0:
            raise self._nothing(problem.offset + float(least.sum()))
        above = problem.cost - least[problem.group_of]
        swapped = Problem(
            problem.groups,
            problem.options,
            problem.resources[self._resource],
            {**problem.resources, _OBJECTIVE: above},
            {**problem.budgets, _OBJECTIVE: room},
            offset=problem.fixed.get(self._resource, 0.0),
            fixed=problem.fixed,
        )
        solution = solve(swapped, self._solver, time_limit=self._left(1), **self._settings)
        if solution.choice is None or not self._offer(solution.choice):
            raise self._nothing(None)
        if solution.bound is not None:
            self._raise(solution.bound * (1 - BUDGET_TOLERANCE))
        return self._found()

    def bisected(self) -> SmallestUse:
        """With pair terms: the least objective at one budget after the other."""
        problem, resource = self._problem, self._resource
        largest = float(np.maximum.reduceat(problem.resources[resource], problem.group_offsets[:-1]).sum())
        largest += problem.fixed.get(resource, 0.0)
        largest = min(largest, problem.budgets.get(resource, largest))
        reached = self._try(largest, steps=20)
        if self._best is None:
            raise self._nothing(reached)
        lowest = self._at_least
        unreached = lowest if self._try(lowest, steps=20) is not None else lowest - 1.0
        while not self._expired():
            below = max(unreached, self._at_least - 1.0 if self._whole else self._at_least)
            width, unit = self._best.usage - below, 1.0 if self._whole else FINEST * self._best.usage
            if width <= unit:
                break
            budget = below + width / 2
            budget = float(math.floor(budget)) if self._whole else budget
            if self._try(budget, steps=math.ceil(math.log2(width / unit)) + 1) is not None:
                unreached = budget
        return self._found()

    def _try(self, budget: float, *, steps: int) -> float | None:
        """Solve at a budget; None when a choice within the limit came out, else the least objective found."""
        best = self._best
        if best is not None and best.usage <= budget:
            return None
        stated = self._problem.with_budgets(**{self._resource: budget})
        solution = solve(stated, self._solver, time_limit=self._left(steps), **self._settings)
        if solution.choice is not None and self._offer(solution.choice):
            return None
        proven = solution.bound is not None and solution.bound > self._limit()
        if proven or (solution.choice is None and str(solution.status) == "INFEASIBLE"):
            self._raise(math.floor(budget) + 1.0 if self._whole else budget)
        return math.inf if solution.objective is None else solution.objective

    def _offer(self, choice: NDArray[np.int64]) -> bool:
        """Keep a choice within the limit and the budgets; whether it is."""
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
        return SmallestUse(**values, at_least=min(self._at_least, best.usage))

    def _raise(self, at_least: float) -> None:
        """Take a proven smallest use; one of whole numbers is a whole number."""
        value = math.ceil(at_least * (1 - BUDGET_TOLERANCE)) if self._whole else at_least
        self._at_least = max(self._at_least, float(value))

    def _limit(self) -> float:
        return self._at_most + BUDGET_TOLERANCE * abs(self._at_most)

    def _left(self, steps: int) -> float | None:
        """Seconds for the next of so many solves."""
        return None if self._deadline is None else max((self._deadline - time.perf_counter()) / steps, 0.01)

    def _expired(self) -> bool:
        return self._deadline is not None and time.perf_counter() >= self._deadline

    def _nothing(self, reached: float | None) -> InfeasibleBudgetError:
        came = "" if reached is None or math.isinf(reached) else f"; the least found is {reached:.6g}"
        error = InfeasibleBudgetError(
            f"no choice within the budgets has an objective of at most {self._at_most:g}{came}"
        )
        error.problem = self._problem
        return error
