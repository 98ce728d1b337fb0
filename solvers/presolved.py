"""Running a back end on what presolve leaves: part after part, judged on the original problem.

The back end sees each part of a `formulations.reductions.presolve.Reduction` as a problem of its own, scaled to about
1. What it offers is lifted, joined with the best of the other parts, and offered to the search of the original; the
bounds of the parts add up to one of the original. What always holds: trace, progress and status speak of the original
only.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.reductions.presolve import Reduction
from formulations.reductions.restriction import Restriction
from solvers.base import Search
from solvers.scaling import objective_size

Attack = Callable[[Problem, Search], None]
"""What is done to a scaled problem: a back end's run, after a bound where one is asked for."""

Choice = NDArray[np.int64]


def solve_parts(reduction: Reduction, search: Search, attack: Attack) -> None:
    """Attack every part with its share of the time, by its number of options; close the search when all are closed."""
    search.details["presolve"] = reduction.summary()
    if not reduction.feasible:
        search.close()
        return
    joint = _Joint(reduction, search)
    sizes = [part.problem.num_options for part in reduction.parts]
    for at, size in enumerate(sizes):
        if search.expired():
            return
        part = PartSearch(joint, at, search.remaining() * size / sum(sizes[at:]))
        try:
            part.begin()
            if not part.proven():
                attack(part.original.scaled(part.scale), part)
        finally:
            joint.keep(part)
        if part.proven_infeasible:
            break
    joint.end()


class PartSearch(Search):
    """The search of one part. Random numbers and timing are the whole's, and so are details when it is the only one."""

    def __init__(self, joint: "_Joint", at: int, seconds: float) -> None:
        problem, whole = joint.reduction.parts[at].problem, joint.search
        self.scale = 1.0 / objective_size(problem)
        super().__init__(
            problem,
            solver="part",
            scale=self.scale,
            time_limit=None if seconds == float("inf") else max(seconds, 1e-9),
            seed=whole.seed,
            initial=joint.hints[at],
        )
        self._joint, self._at = joint, at
        self.closed = False
        self.rng, self.timing = whole.rng, whole.timing
        if len(joint.reduction.parts) == 1:
            self.details = whole.details

    def begin(self) -> None:
        """Take up what the part's choice is so far."""
        if (start := self._joint.choices[self._at]) is not None:
            self.offer(start)

    def report(self) -> None:
        """Pass on what is new."""
        self._joint.tell(self._at, self.choice, self._bound)

    def recover(self, error: Exception) -> None:
        """Keep what is known after an error; the whole ends with it as well."""
        super().recover(error)
        self._joint.search.recover(error)

    def close(self) -> None:
        """Every choice of the part was considered."""
        self.closed = True
        super().close()

    def _magnitude(self, choice: Choice) -> float:
        """No more than the part's share of the whole's: or all parts could be proven and the whole not."""
        own, whole = super()._magnitude(choice), self._joint.search
        return own if whole.choice is None else min(own, whole._magnitude(whole.choice) / len(self._joint.bounds))

    @property
    def proven_infeasible(self) -> bool:
        """Whether the part, and with it the whole, has no choice within the budgets."""
        return self.closed and self.choice is None


class _Joint:
    """What is known of all parts, and what follows for the whole."""

    def __init__(self, reduction: Reduction, search: Search) -> None:
        self.reduction, self.search = reduction, search
        parts = reduction.parts
        self.hints: list[Choice | None] = [None] * len(parts)
        self.bounds: list[float | None] = [None] * len(parts)
        self.searches: list[PartSearch] = []
        if search.initial is not None:
            self.hints = list(reduction.lower(search.initial))
        starts = self.hints
        if len(parts) > 1 and search.initial is None:
            starts = [_cheap(part) for part in parts]  # or nothing could be offered before the last part
        self.choices = [
            start if start is not None and part.problem.evaluate(start).feasible else None
            for start, part in zip(starts, parts, strict=True)
        ]
        self._offer()

    def tell(self, at: int, choice: Choice | None, bound: float | None) -> None:
        """Take the state of a part, and tell the whole's search what follows; it reports in any case."""
        heard = False
        if choice is not None and choice is not self.choices[at]:
            self.choices[at] = choice
            heard = self._offer()
        if bound is not None and bound != self.bounds[at]:
            self.bounds[at] = bound
            before = self.search.bound
            known = [one for one in self.bounds if one is not None]
            if len(known) == len(self.bounds):
                self.search.raise_bound((self.reduction.constant + sum(known)) / self.search.unscaled(1.0))
            heard |= self.search.bound != before
        if not heard:
            self.search.report()

    def _offer(self) -> bool:
        known = [one for one in self.choices if one is not None]
        return len(known) == len(self.choices) and self.search.offer(self.reduction.lift(known))

    def keep(self, part: PartSearch) -> None:
        """Take over what a part's search leaves behind: details, and its pool joined with the best of the others."""
        at, details, whole = len(self.searches), self.search.details, self.reduction.original
        self.searches.append(part)
        if part.details is not details:
            details.setdefault("parts", []).append(part.details)
        if "prices" in part.details:
            prices = details.get("prices", {}) | part.details["prices"]
            details["prices"] = {name: prices.get(name, 0.0) for name in whole.budgets}
        pool = dict(self.search.pool)
        for choice, _ in part.pool:
            joined = [one for one in (*self.choices[:at], np.array(choice), *self.choices[at + 1 :]) if one is not None]
            if len(joined) == len(self.choices):
                lifted = self.reduction.lift(joined)
                if (judged := whole.evaluate(lifted)).feasible:
                    pool[tuple(lifted.tolist())] = judged.objective
        self.search.pool = sorted(pool.items(), key=lambda entry: entry[1])

    def end(self) -> None:
        """Say for the whole what holds for the parts."""
        if any(part.proven_infeasible for part in self.searches):
            if self.search.choice is None:
                self.search.close()
        elif all(part.closed for part in self.searches) and (self.search.choice is not None or not self.searches):
            self.search.close()
        elif any(part.cut for part in self.searches):
            self.search.cut_short()


def _cheap(part: Restriction) -> Choice | None:
    """A choice within the budgets, from every group's cheapest option."""
    from solvers.kernels.repair import repair  # compiled code, imported only when it is used

    problem = part.problem
    return repair(problem, [int(np.argmin(problem.cost[begin:end])) for begin, end in pairwise(problem.group_offsets)])
