"""The search of what a reduction makes of a problem, on behalf of the search of that problem.

A `SubSearch` searches a reduction's problem (scaled, a part, what presolve leaves) and hands every choice and bound
back to the search it stands in, lifted, where it is judged again. So solvers do no arithmetic about where their problem
came from.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.reductions.base import Reduction
from solvers.search import Search


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
            self.share_clock(outer)
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
        return {
            "solver": self.solver,
            "seed": self.seed,
            "objective": self.in_stated_unit(self.objective),
            "bound": self.in_stated_unit(self.bound),
            "wall_s": self.elapsed(),
            "details": self.details,
        }
