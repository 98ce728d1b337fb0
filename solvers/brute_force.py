"""`brute-force`: look at every choice. The oracle that all other back ends are tested against.

Depth first over the groups in their order. A partial choice keeps the sums of everything before it, so that one more
option costs ``O(r + degree + K)`` and nothing is ever subtracted: no error builds up. A partial choice is left
early only when its uses break a budget, for uses are never negative; the objective is never used to skip anything.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numba import njit

from formulations import Problem
from solvers.tables import FloatArray, IntArray, budget_arrays, factor_array, sparse_columns
from solvers.base import Search, Solver

MAX_CHOICES = 10**9
"""Beyond this many choices the solver refuses (it looks at some 50 million a second)."""

TIE = 1e-12
"""Choices whose objectives differ by less than this, relative to the size of their terms, are a tie: the first wins."""

STEPS_BETWEEN_CLOCK_LOOKS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BruteForce(Solver):
    """Every choice, one after the other; among equal ones the first in lexicographic order.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solve(problem, "brute-force").choice.tolist()
    [0, 1]
    """

    name: ClassVar[str] = "brute-force"
    summary: ClassVar[str] = "every choice, one after the other; small problems only"
    exact: ClassVar[bool] = True

    def refuse(self, problem: Problem) -> str:
        """Too many choices to look at."""
        count = num_choices(problem)
        if count <= MAX_CHOICES:
            return ""
        return (
            f"solver 'brute-force' looks at up to {MAX_CHOICES:.0e} choices, this problem has "
            f"{count:.3g}; use 'auto', 'lagrangian', 'milp' or 'anneal'"
        )

    def run(self, problem: Problem, search: Search) -> None:
        """Enumerate in slices of `STEPS_BETWEEN_CLOCK_LOOKS`, handing in the best after each."""
        use, limit = budget_arrays(problem)
        factor, sparse = factor_array(problem), sparse_columns(problem)
        first = problem.group_offsets
        size = np.maximum.reduceat(np.abs(problem.cost), first[:-1]).sum() + 1.0  # pair terms are scaled to 1
        best = np.array([np.inf])
        best_choice = np.zeros(problem.num_groups, dtype=np.int64)
        state = _State.fresh(problem, use.shape[1], factor.shape[1])
        depth = 0
        while depth >= 0:
            if search.expired():
                return
            depth = _enumerate(
                depth,
                STEPS_BETWEEN_CLOCK_LOOKS,
                first,
                problem.group_of,
                problem.cost,
                use,
                limit,
                factor,
                *sparse,
                *state.arrays,
                best,
                best_choice,
                TIE * size,
            )
            if np.isfinite(best[0]):
                search.offer(best_choice - first[:-1])
        if search.choice is not None or np.isinf(best[0]):
            search.close()


def num_choices(problem: Problem) -> float:
    """How many choices there are: the product of the groups' sizes (infinite beyond 1e308)."""
    return float(np.exp(np.minimum(np.log(np.diff(problem.group_offsets)).sum(), 709.0)))


@dataclass(frozen=True, slots=True)
class _State:
    """Where the enumeration stands: for each depth the next option to try and the sums of what is chosen before."""

    arrays: tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray]

    @classmethod
    def fresh(cls, problem: Problem, num_budgets: int, rank: int) -> "_State":
        groups = problem.num_groups
        return cls(
            (
                problem.group_offsets[:-1].copy(),
                np.zeros(groups, dtype=np.int64),
                np.zeros(groups + 1),
                np.zeros((groups + 1, num_budgets)),
                np.zeros((groups + 1, rank)),
            )
        )


@njit(cache=True)  # type: ignore[untyped-decorator]
def _enumerate(
    depth: int,
    steps: int,
    first: IntArray,
    group_of: IntArray,
    cost: FloatArray,
    use: FloatArray,
    limit: FloatArray,
    factor: FloatArray,
    start: IntArray,
    partner: IntArray,
    data: FloatArray,
    following: IntArray,
    chosen: IntArray,
    value: FloatArray,
    used: FloatArray,
    effect: FloatArray,
    best: FloatArray,
    best_choice: IntArray,
    tie: float,
) -> int:
    """Go on from ``depth`` for ``steps`` options; the depth to go on from next, -1 when all was seen."""
    last = len(first) - 2
    while steps > 0 and depth >= 0:
        option = following[depth]
        if option == first[depth + 1]:
            depth -= 1
            continue
        following[depth] += 1
        steps -= 1

        within = True
        for k in range(len(limit)):
            used[depth + 1, k] = used[depth, k] + use[option, k]
            within &= used[depth + 1, k] <= limit[k]
        if not within:
            continue

        total = value[depth] + cost[option]
        for i in range(factor.shape[1]):
            total += effect[depth, i] * factor[option, i]
            effect[depth + 1, i] = effect[depth, i] + factor[option, i]
        for entry in range(start[option], start[option + 1]):
            other = partner[entry]
            if chosen[group_of[other]] == other:
                total += data[entry]
        value[depth + 1] = total
        chosen[depth] = option

        if depth < last:
            depth += 1
            following[depth] = first[depth]
        elif total < best[0] - tie:
            best[0] = total
            best_choice[:] = chosen
    return depth
