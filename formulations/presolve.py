"""Smaller problems with the same answer, and the way back.

`restrict` leaves options out and folds in groups that have one option left: their cost, their pair terms with the
others and their use become part of the cost, the offset and the budgets. What always holds: a choice of the smaller
problem and its `lift` have the same objective, and the same budgets are met, up to the rounding of a sum.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import BUDGET_TOLERANCE, Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Restriction:
    """A part of a problem.

    Attributes:
        problem: what is left to decide (one group with one option when nothing is).
        options: ``(V',)`` flat options of the original, in the smaller problem's order.
        decided: ``(G,)`` flat options of the original: those of the folded groups, and any one for the others.
        original: the problem it is part of.
    """

    problem: Problem
    options: NDArray[np.int64]
    decided: NDArray[np.int64]
    original: Problem

    def lift(self, choice: ArrayLike) -> NDArray[np.int64]:
        """The original's choice ``(G,)`` for one of the smaller problem."""
        chosen = self.decided.copy()
        flat = self.options[self.problem.flat(choice)]
        chosen[self.original.group_of[flat]] = flat
        return chosen - self.original.group_offsets[:-1]

    def lower(self, choice: ArrayLike) -> NDArray[np.int64] | None:
        """The smaller problem's choice for one of the original; None when it takes an option that was left out."""
        chosen = self.original.flat(choice)
        place = np.full(self.original.num_options, -1)
        place[self.options] = np.arange(len(self.options))
        groups = self.original.group_of[self.options[self.problem.group_offsets[:-1]]]
        rest = np.ones(len(chosen), dtype=bool)
        rest[groups] = False
        if (place[chosen[groups]] < 0).any() or (chosen[rest] != self.decided[rest]).any():
            return None
        return place[chosen[groups]] - self.problem.group_offsets[:-1]


def restrict(problem: Problem, keep: NDArray[np.bool_]) -> Restriction:
    """The problem with only the options that ``keep`` ``(V,)`` marks; groups with one option left are folded in.

    Raises:
        InvalidProblemError: a group is left without an option.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> small = restrict(problem, np.array([True, False, True, True]))
    >>> small.problem.groups, small.lift([1]).tolist()
    (('b',), [0, 1])
    """
    first, group_of = problem.group_offsets, problem.group_of
    left = np.bincount(group_of[keep], minlength=problem.num_groups)
    if (left == 0).any():
        raise InvalidProblemError(f"group {problem.groups[int(np.argmin(left))]!r} is left without an option")
    decided = np.flatnonzero(keep)[np.cumsum(left) - left]  # the first one that is left
    folded = left == 1
    if folded.all():
        folded[-1] = False  # a problem has at least one group
    fixed = decided[folded]
    options = np.flatnonzero(keep & ~folded[group_of])

    x = np.zeros(problem.num_options)
    x[fixed] = 1.0
    cost, offset = problem.cost[options].copy(), problem.offset + problem.cost[fixed].sum()
    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    if factor is not None:
        total = factor[fixed].sum(axis=0)
        offset += 0.5 * (total @ total - np.square(factor[fixed]).sum())
        cost += factor[options] @ total
        factor = factor[options]
        factor.flags.writeable = False  # so that it need not be copied
    if sparse is not None:
        offset += x @ (sparse @ x)
        cost += (sparse @ x + sparse.T @ x)[options]
        sparse = sparse[options][:, options]
    uses = {name: problem.resources[name][options] for name in problem.budgets}
    budgets = {}
    for name, budget in problem.budgets.items():
        left_over = budget + BUDGET_TOLERANCE * abs(budget) - problem.resources[name][fixed].sum()
        budgets[name] = float(left_over - BUDGET_TOLERANCE * abs(left_over))
    kept, whole = np.flatnonzero(~folded).tolist(), left == np.diff(first)
    smaller = Problem(
        [problem.groups[g] for g in kept],
        [
            problem.options[g]
            if whole[g]
            else [problem.options[g][v - first[g]] for v in range(first[g], first[g + 1]) if keep[v]]
            for g in kept
        ],
        cost,
        uses,
        budgets,
        PairTerms(sparse=sparse, factor=factor),
        float(offset),
    )
    return Restriction(problem=smaller, options=options, decided=decided, original=problem)
