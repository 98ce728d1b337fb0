"""Presolve: remove options, groups and budgets from a problem before it is solved, and map solutions back.

`reduce_problem` repeats these steps until nothing changes:

* remove each option whose use exceeds a budget even with the smallest uses of all other groups;
* remove each budget that no remaining choice can exceed;
* remove each dominated option (`formulations.reductions.dominance`).

Groups with one option left are then folded in, a budget of whole uses is lowered to the largest reachable sum of uses,
and independent groups become separate problems (`formulations.reductions.components`). An optimal choice of the reduced
problem lifts to an optimal choice of the original with the same objective, up to rounding errors of sums. If the
reduced problem is infeasible, so is the original.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from formulations.problem import BUDGET_TOLERANCE, Problem, limit_of
from formulations.reductions.base import Choice, Reduction
from formulations.reductions.components import Component, split
from formulations.reductions.dominance import Flags, Integers, drop_dominated
from formulations.reductions.restriction import Restriction, restrict

GRAIN = 2.0**-10
"""Uses that are multiples of this are added without rounding errors (up to a sum of `WHOLE` multiples)."""

WHOLE = 2.0**53

LARGE_FACTOR, COPY_PAYS = 20_000_000, 0.05
"""A factor with more numbers than this is copied only if at least this fraction of the options is removed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Presolved(Reduction):
    """A problem without the options, groups and budgets that no optimal choice needs.

    Attributes:
        original: the problem that was reduced.
        problem: the remaining problem (one group with one option when everything is decided); the original itself if
            nothing is removed.
        feasible: False when no choice meets the budgets; True does not prove that one does.
        parts: the independent components of `problem`, smallest first; empty when everything is decided.
        restriction: the reduction that maps choices of `problem` to choices of the original.
        stand_in: ``(V,)`` flat options of the original: for each removed option, a kept one that is never worse.
        budgets_dropped: names of budgets that no remaining choice can exceed.
        budgets_lowered: names of budgets that were lowered to the largest reachable sum of uses.
    """

    original: Problem
    problem: Problem
    feasible: bool
    parts: tuple[Component, ...]
    restriction: Restriction
    stand_in: Integers
    budgets_dropped: tuple[str, ...]
    budgets_lowered: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether the search space became smaller or splits into parts."""
        return not self.feasible or len(self.parts) != 1 or self.problem is not self.original

    def lift(self, choice: ArrayLike) -> Choice:
        """Map a choice of the reduced problem to a choice ``(G,)`` of the original."""
        return self.restriction.lift(choice)

    def lower(self, choice: ArrayLike) -> Choice:
        """Map a choice of the original to the reduced problem; removed options are replaced by their ``stand_in``.

        If the choice is feasible, the lifted result is feasible too and no worse.
        """
        stands = self.stand_in[self.original.flat(choice)] - self.original.group_offsets[:-1]
        lowered = self.restriction.lower(stands)
        assert lowered is not None  # noqa: S101 - replacements are kept options
        return lowered

    def lift_bound(self, bound: float) -> float:
        """Return the same bound."""
        return bound

    def join(self, choices: Sequence[ArrayLike]) -> Choice:
        """Join one choice of each part into a choice of the reduced problem."""
        joined = np.zeros(self.problem.num_groups, dtype=np.int64)
        for part, choice in zip(self.parts, choices, strict=True):
            joined[part.groups] = choice
        return joined

    def summary(self) -> dict[str, Any]:
        """Summarise the reduction for JSON: sizes before and after, and the names of the changed budgets."""
        problems = [part.problem for part in self.parts]
        return {
            "groups": [self.original.num_groups, sum(part.num_groups for part in problems)],
            "options": [self.original.num_options, sum(part.num_options for part in problems)],
            "budgets_dropped": list(self.budgets_dropped),
            "budgets_lowered": list(self.budgets_lowered),
            "parts": len(problems),
        }


def reduce_problem(problem: Problem, expired: Callable[[], bool] = lambda: False) -> Presolved:
    """Reduce a problem to the part that must be searched.

    Args:
        problem: any problem whose budgets have no pair terms.
        expired: function that says whether the time is over; then no further options are compared.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 20})
    >>> reduction = reduce_problem(problem)
    >>> reduction.summary()["options"], reduction.lift(reduction.join([])).tolist()
    ([4, 0], [0, 0])
    """
    problem.require_linear_budgets("presolve")
    original, problem = problem, problem.without_fixed()
    keep, stand_in = np.ones(problem.num_options, dtype=bool), np.arange(problem.num_options)
    budgets, dropped = list(problem.budgets), list[str]()
    while True:
        before = int(keep.sum())
        if not drop_never_feasible(problem, keep, budgets):
            return _infeasible(original)
        loose = [name for name in budgets if _never_binds(problem, keep, name)]
        budgets, dropped = [name for name in budgets if name not in loose], dropped + loose
        drop_dominated(problem, keep, stand_in, budgets, expired)
        if (keep.sum() == before and not loose) or expired():
            break
    if problem.pairs.rank * problem.num_options > LARGE_FACTOR and keep.mean() > 1.0 - COPY_PAYS:
        keep[:] = True
        dropped = [name for name in problem.budgets if _never_binds(problem, keep, name)]
        budgets = [name for name in problem.budgets if name not in dropped]
    small = problem
    if dropped:
        small = problem.derived(budgets=MappingProxyType({name: problem.budgets[name] for name in budgets}))
    num_kept = np.bincount(problem.group_of[keep])
    restriction = _everything(small) if num_kept.min() > 1 and keep.all() else restrict(small, keep)
    stated = restriction.problem.without_fixed()
    lowered = {name: budget for name in budgets if (budget := _lowered(stated, name)) is not None}
    if lowered:
        stated = stated.derived(budgets=MappingProxyType({**stated.budgets, **lowered}))
    while not np.array_equal(further := stand_in[stand_in], stand_in):
        stand_in = further
    return Presolved(
        original=original,
        problem=stated,
        feasible=True,
        parts=split(stated) if num_kept.max() > 1 else (),
        restriction=restriction,
        stand_in=np.where(keep[stand_in], stand_in, restriction.decided[problem.group_of]),
        budgets_dropped=tuple(dropped),
        budgets_lowered=tuple(lowered),
    )


def _everything(problem: Problem) -> Restriction:
    """Return the restriction that keeps all options, without copying anything."""
    options = np.arange(problem.num_options)
    return Restriction(original=problem, problem=problem, options=options, decided=problem.group_offsets[:-1])


def _infeasible(problem: Problem) -> Presolved:
    return Presolved(
        original=problem,
        problem=problem,
        feasible=False,
        parts=(),
        restriction=_everything(problem),
        stand_in=np.arange(problem.num_options),
        budgets_dropped=(),
        budgets_lowered=(),
    )


def drop_never_feasible(problem: Problem, keep: Flags, budgets: list[str]) -> bool:
    """Drop options that exceed a budget with the smallest uses of all other groups; False if a group loses all."""
    starts, group_of = problem.group_offsets[:-1], problem.group_of
    while True:
        before = int(keep.sum())
        for name in budgets:
            use, budget = problem.resources[name], problem.budgets[name]
            least = np.minimum.reduceat(np.where(keep, use, np.inf), starts)
            room = budget + 2 * BUDGET_TOLERANCE * abs(budget) - least.sum()
            if not room >= 0:  # minus infinity if a group has no option left
                return False
            keep &= use - least[group_of] <= room
        if keep.sum() == before:
            return True


def _never_binds(problem: Problem, keep: Flags, name: str) -> bool:
    """Whether even the largest uses meet the budget."""
    budget = problem.budgets[name]
    most = np.maximum.reduceat(np.where(keep, problem.resources[name], 0.0), problem.group_offsets[:-1]).sum()
    return bool(most <= budget + 0.5 * BUDGET_TOLERANCE * abs(budget))


def _lowered(problem: Problem, name: str) -> float | None:
    """Return the largest sum of uses within a budget, by their common unit; None if it is not below the budget."""
    use, budget, starts = problem.resources[name], problem.budgets[name], problem.group_offsets[:-1]
    least = np.minimum.reduceat(use, starts)
    if np.maximum.reduceat(use, starts).sum() >= WHOLE * GRAIN or (use % GRAIN).any():
        return None
    unit = GRAIN * int(np.gcd.reduce(((use - least[problem.group_of]) / GRAIN).astype(np.int64)))
    if unit <= 4 * BUDGET_TOLERANCE * abs(budget):  # also 0, if no group has a choice of uses
        return None
    lowered = least.sum() + np.floor((limit_of(budget) - least.sum()) / unit) * unit
    return None if lowered >= budget else float(lowered)
