"""Run a back end on the presolved problem, part by part, with results evaluated on the original problem.

The back end gets each component of the presolved problem as a separate problem, scaled to about 1, while the other
components take their best known choices. The bounds of the components add up to a bound of the original. Trace,
progress and status always refer to the original problem.
"""

from collections.abc import Callable

import numpy as np

from formulations import Problem
from formulations.reductions.base import Choice
from formulations.reductions.presolve import Presolved
from solvers.search import Search, cheapest
from solvers.sub_search import SubSearch

Attack = Callable[[Search], None]
"""Function that searches the problem of a search: a bound if requested, then a back end's run."""


def solve_parts(reduction: Presolved, search: Search, attack: Attack) -> None:
    """Solve every part, with time in proportion to its options; close the search when all parts are closed."""
    search.details["presolve"] = reduction.summary()
    if not reduction.feasible:
        search.close()
        return
    joint = _Joint(reduction, search)
    sizes = [part.problem.num_options for part in reduction.parts]
    for number, size in enumerate(sizes):
        if search.expired():
            return
        part = joint.search_of(number, search.remaining() * size / sum(sizes[number:]))
        try:
            if (start := joint.choices[number]) is not None:
                part.begin_from(start)
            if not part.proven():
                attack(part)
        finally:
            joint.keep(part)
        if part.closed and part.choice is None:
            break
    joint.end()


class _Joint:
    """The state of all parts, and its consequences for the whole problem."""

    def __init__(self, reduction: Presolved, search: Search) -> None:
        self.reduction, self.search = reduction, search
        parts = reduction.parts
        self.hints: list[Choice | None] = [None] * len(parts)
        self.bounds: list[float | None] = [None] * len(parts)
        self.searches: list[SubSearch] = []
        if search.initial is not None:
            lowered = reduction.lower(search.initial)
            self.hints = [part.lower(lowered) for part in parts]
        starts = self.hints
        if len(parts) > 1 and search.initial is None:
            starts = [cheap(part.problem) for part in parts]  # else nothing could be offered before the last part
        self.choices = [
            start if start is not None and part.problem.evaluate(start).feasible else None
            for start, part in zip(starts, parts, strict=True)
        ]
        if (joined := self._joined(self.choices)) is not None:
            search.offer(joined)

    def search_of(self, number: int, seconds: float) -> SubSearch:
        """Return the search of a part, given the best known choices of the others."""
        parts = self.reduction.parts
        other_choices = [choice for i, choice in enumerate(self.choices) if i != number]
        bounds = [-np.inf if bound is None else bound for i, bound in enumerate(self.bounds) if i != number]
        firsts = [np.zeros(part.problem.num_groups, dtype=np.int64) for part in parts]
        rest = self.reduction.join([first if c is None else c for c, first in zip(self.choices, firsts, strict=True)])
        component = parts[number].beside(rest, self.reduction.problem.offset + sum(bounds))
        part = SubSearch(
            self.reduction.then(component),
            self.search,
            seconds=seconds,
            initial=self.hints[number],
            shares=len(parts),
        )
        part.constant = 0.0
        if other_choices:
            part.details = {}
        return part

    def keep(self, part: SubSearch) -> None:
        """Take over the results of a part's search: its details, and its pool joined with the others' best choices."""
        number, details, original = len(self.searches), self.search.details, self.reduction.original
        self.searches.append(part)
        self.choices[number] = part.choice
        self.bounds[number] = part.bound
        if part.details is not details:
            details.setdefault("parts", []).append(part.details)
        if "prices" in part.details:
            prices = details.get("prices", {}) | part.details["prices"]
            details["prices"] = {name: prices.get(name, 0.0) for name in original.budgets}
        pool = dict(self.search.pool)
        for choice, _ in part.pool:
            lifted = self._joined([*self.choices[:number], np.array(choice), *self.choices[number + 1 :]])
            if lifted is not None and (judged := original.evaluate(lifted)).feasible:
                pool[tuple(lifted.tolist())] = judged.objective
        self.search.pool = sorted(pool.items(), key=lambda entry: entry[1])

    def end(self) -> None:
        """Close the whole search or mark it as cut short, depending on the parts."""
        if any(part.closed and part.choice is None for part in self.searches):
            if self.search.choice is None:
                self.search.close()
        elif all(part.closed for part in self.searches) and (self.search.choice is not None or not self.searches):
            self.search.close()
        elif any(part.cut for part in self.searches):
            self.search.cut_short()

    def _joined(self, choices: list[Choice | None]) -> Choice | None:
        """Return the original's choice for one choice of every part; None when one is missing."""
        found_choices = [choice for choice in choices if choice is not None]
        return self.reduction.lift(self.reduction.join(found_choices)) if len(found_choices) == len(choices) else None


def cheap(problem: Problem) -> Choice | None:
    """Repair the choice of every group's cheapest option to meet the budgets."""
    from solvers.kernels.repair import repair  # compiled code, imported only when used

    return repair(problem, cheapest(problem))
