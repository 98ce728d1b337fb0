"""Coordinate descent over a problem's choices, one group at a time: enough to find prices and to check neighbours.

In this module a choice is an array ``(G,)`` of flat option indices, one per group.
"""

import numpy as np
import scipy.sparse

from formulations.forms.couplings import Floats, Integers
from formulations.problem import Problem

SWEEPS = 10
"""Maximum number of passes over all groups in one descent."""


class Descent:
    """Searches that change single groups."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.starts = problem, problem.group_offsets[:-1]
        sparse = problem.pairs.sparse
        self.sparse = None if sparse is None else scipy.sparse.csr_array(sparse + sparse.T)
        self.factor = np.zeros((problem.num_options, 0)) if problem.pairs.factor is None else problem.pairs.factor

    def cheapest(self, priced: Floats) -> Integers:
        """Return every group's option with the least cost plus ``priced``, without pair terms."""
        order = np.lexsort((self.problem.cost + priced, self.problem.group_of))
        return np.asarray(order[self.starts])

    def objective(self, chosen: Integers) -> float:
        """Return the objective of a choice."""
        return float(self.problem.evaluate(chosen - self.starts).objective)

    def descended(self, priced: Floats, chosen: Integers) -> Integers:
        """Return the better result of two descents at costs plus ``priced``: from ``chosen`` and from `cheapest`."""
        cheapest = self.cheapest(priced)
        if not self.problem.pairs:
            return cheapest
        ends = [self._descended(self.problem.cost + priced, start) for start in (chosen.copy(), cheapest)]
        return min(ends, key=lambda flat: self.objective(flat) + float(priced[flat].sum()))

    def added(self, chosen: Integers) -> Floats:
        """Return the change ``(V,)`` of the objective if an option replaces its group's chosen option."""
        group_of = self.problem.group_of
        total = self.factor[chosen].sum(axis=0)
        value = self.problem.cost + np.einsum("vr,vr->v", self.factor, total - self.factor[chosen][group_of])
        if self.sparse is not None:
            value = value + np.asarray(self.sparse[:, chosen].sum(axis=1)).ravel()
        return np.asarray(value - value[chosen][group_of])

    def repaired(self, chosen: Integers, use: Floats, budget: Floats) -> Integers | None:
        """Change options, cheapest per saved use first, until the choice is within the budgets; None if that fails.

        Args:
            chosen: the choice.
            use: uses ``(V, K)`` of K resources.
            budget: budgets ``(K,)``.
        """
        group_of, chosen = self.problem.group_of, chosen.copy()
        for _ in range(2 * self.problem.num_groups):
            missed = np.maximum(use[chosen].sum(axis=0) - budget, 0.0)
            if not missed.any():
                return chosen
            saved = np.minimum(use[chosen][group_of] - use, missed) @ (1.0 / np.maximum(budget, 1.0))
            if not (saved > 0).any():
                return None
            added = self.added(chosen)
            rate = added / np.where((saved > 0) & (added > 0), saved, 1.0)
            rate[saved <= 0] = np.inf
            best = int(rate.argmin())
            chosen[group_of[best]] = best
        return None

    def _descended(self, cost: Floats, chosen: Integers) -> Integers:
        total = self.factor[chosen].sum(axis=0)
        for _ in range(SWEEPS):
            changed = False
            for group, (start, end) in enumerate(zip(self.starts, self.problem.group_offsets[1:], strict=True)):
                value = cost[start:end] + self.factor[start:end] @ (total - self.factor[chosen[group]])
                if self.sparse is not None:
                    value += self.sparse[start:end][:, chosen].sum(axis=1)
                best = start + int(value.argmin())
                if value[best - start] < value[chosen[group] - start]:
                    total += self.factor[best] - self.factor[chosen[group]]
                    chosen[group], changed = best, True
            if not changed:
                break
        return chosen
