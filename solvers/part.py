"""Searching a part of a problem on behalf of the whole: every choice that is found is lifted and offered there."""

from numpy.typing import ArrayLike

from formulations.reductions.restriction import Restriction
from solvers.base import Search, Solver


class PartSearch(Search):
    """The search of a part. It shares clock, random numbers and details with the whole one, and passes choices on."""

    def __init__(self, part: Restriction, whole: Search) -> None:
        limit = whole.remaining()
        super().__init__(part.problem, solver="part", time_limit=None if limit == float("inf") else max(limit, 1e-9))
        self._part, self._whole = part, whole
        self.rng, self.details, self.timing = whole.rng, whole.details, whole.timing
        self.initial = None if whole.choice is None else part.lower(whole.choice)

    def offer(self, choice: ArrayLike) -> bool:
        """Judge a choice of the part, keep it when better, and offer it to the whole."""
        if kept := super().offer(choice):
            self._whole.offer(self._part.lift(choice))
        return kept


def search_part(solver: Solver, part: Restriction, search: Search) -> None:
    """Run ``solver`` on a part of the problem ``search`` is about, from the incumbent if that lies in the part."""
    solver.run(part.problem, PartSearch(part, search))
