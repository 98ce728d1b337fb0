"""The search of the problem that a caller stated.

It searches the problem without its offset, which no choice changes: next to an offset of 1e12, objectives that differ
by 1e-6 are the same float. What is shown (trace, progress, solution) includes the offset.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from formulations import Problem
from solvers.search import Search
from solvers.solution import Solution, StopReason, relative_gap


class StatedSearch(Search):
    """The search of a stated problem.

    Attributes:
        problem: the stated problem without its offset; choices, objectives and bounds refer to it.
    """

    def __init__(self, problem: Problem, **settings: Any) -> None:
        super().__init__(problem.derived(offset=0.0) if problem.offset else problem, **settings)
        self.constant, self._asked, self._reported = problem.offset, problem, -np.inf

    @property
    def original(self) -> Problem:
        """The problem that the caller stated."""
        return self._asked

    def raise_shown_bound(self, bound: float) -> bool:
        """Report a proven lower bound that includes the offset, allowing for the rounding of their sum."""
        rounding = np.spacing(max(abs(bound), abs(self.constant))) if self.constant else 0.0
        return self.raise_bound(float(bound - self.constant - rounding))

    def solution(self, stop_reason: StopReason, options: Mapping[str, Any]) -> Solution:
        """Return the current results, with the offset."""
        solution = super().solution(stop_reason, options)
        if not self.constant:
            return solution
        objective, bound = self._shown()
        if bound is not None and objective is not None:
            bound = min(bound, objective)
        return replace(
            solution,
            objective=objective,
            bound=bound,
            gap=relative_gap(objective, bound),
            pool=tuple((choice, self._asked.evaluate(choice).objective) for choice, _ in solution.pool),
            problem_fingerprint=self._asked.fingerprint(),
        )

    def _shown(self) -> tuple[float | None, float | None]:
        """Add the offset to incumbent and bound; a bound that the incumbent does not meet is not rounded up to it."""
        objective, bound = self.objective, self.bound
        shown = None if objective is None else self.constant + objective
        if bound is None or not self.constant:
            return shown, bound
        total = self.constant + bound
        if shown is not None and objective is not None and bound >= objective:
            total = max(shown, total)
        elif total - self.constant > bound:
            total = float(np.nextafter(total, -np.inf))
        self._reported = max(self._reported, total)  # a reported bound is not taken back by rounding
        return shown, self._reported

    def doubt(self, error: float) -> None:
        """Withdraw a proof and lower every bound."""
        self._reported = -np.inf
        super().doubt(error)
