"""The search of a reduced problem on behalf of the search of the original problem.

A `SubSearch` searches the problem of a reduction (scaled, a part, presolved). It lifts every choice and bound and
passes them to the outer search, which evaluates them again. Solvers therefore need not know how their problem was
derived.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.reductions.base import Reduction
from solvers.search import Search


class SubSearch(Search):
    """The search of a reduction's problem on behalf of an outer search, which gets every choice and bound, lifted.

    The search ends when the outer search ends or when its time is over. Unless ``apart``, it is a part of the same run:
    it shares the random numbers and the clock of the outer search, and adds to its timing, its details and, if both
    have the same choices, its pool.

    Args:
        reduction: reduction from the outer search's problem to the problem searched here.
        outer: the outer search.
        seconds: maximum time from now in seconds; None uses the outer search's clock.
        initial: ``(G',)`` a choice to start from.
        apart: whether this is a separate run, with separate random numbers, details, timing and pool.
        seed: random seed of a separate run.
        solver: name of the solver of a separate run.
        shares: number of searches among which the outer search's tolerance is divided.
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
            clock=outer.clock,
        )
        self.reduction, self.outer, self._shares, self._seconds = reduction, outer, shares, seconds
        self.constant = outer.constant
        if seconds is None and not apart:
            self.share_clock(outer)
        if not apart:
            self.rng, self.timing, self.details = outer.rng, outer.timing, outer.details
            if reduction.same_choices:
                self.pool = outer.pool

    @property
    def stated(self) -> Search:
        """The search of the problem that the caller stated."""
        return self.outer.stated

    @property
    def original(self) -> Problem:
        """The problem in its original, unscaled unit."""
        return self.outer.original if self.reduction.same_choices else self.problem

    @property
    def unit(self) -> float:
        """The value of one unit of this problem's objective in units of the stated problem's objective."""
        return self.outer.unit * self.reduction.unit

    @property
    def limit(self) -> float | None:
        """The requested time limit in seconds, or None."""
        return self.outer.limit if self._seconds is None else self._limit

    def expired(self) -> bool:
        """Whether the time of this search or of the outer one is over."""
        return self.outer.expired() or super().expired()

    def proven(self) -> bool:
        """Whether the answer of this search or of the outer one is proven."""
        return self.outer.proven() or (not self.reduction.complete and super().proven())

    def tolerance(self) -> float:
        """Return at most a share of the outer tolerance, so that proofs of all parts prove the whole."""
        return min(super().tolerance(), self.outer.tolerance() / (self.reduction.unit * self._shares))

    def begin_from(self, choice: ArrayLike) -> None:
        """Set the incumbent to a choice that the outer search already knows."""
        super().offer(choice)

    def offer(self, choice: ArrayLike) -> bool:
        """Evaluate a choice, keep it if it is better, and pass it to the outer search."""
        kept = super().offer(choice)
        if kept and not self.outer.offer(self.reduction.lift(choice)):
            self.outer.report()
        return kept

    def raise_bound(self, bound: float) -> bool:
        """Keep a proven bound and pass its consequence to the outer search."""
        kept = super().raise_bound(bound)
        if kept and not self.outer.raise_bound(self.reduction.lift_bound(float(bound))):
            self.outer.report()
        return kept

    def close(self) -> None:
        """Record that every feasible choice was considered, which closes the outer search or gives it a bound."""
        super().close()
        if self.reduction.complete and (self.choice is None or self.outer.choice is not None):
            self.outer.close()
        elif self.bound is not None:
            self.outer.raise_bound(self.reduction.lift_bound(self.bound))

    def recover(self, error: Exception) -> None:
        """End this search and the outer one with the best choice so far after an error."""
        if self.choice is not None or self.outer.choice is None:
            super().recover(error)
        self.outer.recover(error)

    def report(self) -> None:
        """Show that the back end is alive."""
        super().report()
        self.outer.report()

    def summary(self) -> dict[str, Any]:
        """Summarise this search for the outer search's details, with objectives in the stated problem's unit."""
        return {
            "solver": self.solver,
            "seed": self.seed,
            "objective": self.as_stated(self.objective),
            "bound": self.as_stated(self.bound),
            "wall_s": self.elapsed(),
            "details": self.details,
        }
