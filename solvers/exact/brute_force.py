"""`brute-force`: enumerate every choice. All other back ends are tested against this solver.

The enumeration is depth first over the groups in order. Each depth keeps the sums over all previous groups, so one more
option takes ``O(r + degree + K)``, and nothing is ever subtracted, which avoids accumulated errors. A partial choice is
pruned only if it exceeds a budget (uses are never negative); the objective is never used for pruning.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np

from formulations import Problem
from solvers.base import Search, Solver
from solvers.exact.every_choice import TIE, enumerate_paired, rounding_of_ties
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, terms, to_arrays
from solvers.search import num_choices

MAX_CHOICES = 10**9
"""Maximum number of choices (the solver evaluates about 50 million per second)."""

MAX_PAIRED = 10**6
"""Maximum number of choices if budgets have pair terms (about 300,000 per second)."""

STEPS_BETWEEN_CLOCK_LOOKS = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BruteForce(Solver):
    """Enumerate every choice; among equal ones the first in lexicographic order is returned.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solve(problem, "brute-force").choice.tolist()
    [0, 1]
    """

    name: ClassVar[str] = "brute-force"
    summary: ClassVar[str] = "every choice, one after the other; small problems only"
    exact: ClassVar[bool] = True
    native_use_pairs: ClassVar[bool] = True

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with too many choices."""
        count, most = num_choices(problem), MAX_PAIRED if problem.paired_budgets else MAX_CHOICES
        if count <= most:
            return ""
        return (
            f"solver 'brute-force' evaluates up to {most:.0e} choices, this problem has "
            f"{count:.3g}; use 'auto', 'lagrangian', 'milp' or 'anneal'"
        )

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_enumeration()

    def run(self, problem: Problem, search: Search) -> None:
        """Enumerate in slices of `STEPS_BETWEEN_CLOCK_LOOKS`, and report the best choice after each."""
        if problem.paired_budgets:
            enumerate_paired(problem, search)
            return
        a = to_arrays(problem)
        rounding = rounding_of_ties(problem)
        best, best_choice = np.array([np.inf, 0.0]), np.zeros(problem.num_groups, dtype=np.int64)
        state = _State.fresh(a)
        depth = 0
        while depth >= 0:
            if search.expired():
                return
            depth = _enumerate(a, state, depth, STEPS_BETWEEN_CLOCK_LOOKS, rounding, best, best_choice)
            if np.isfinite(best[0]):
                search.offer(best_choice - a.starts[:-1])
        if search.choice is not None or np.isinf(best[0]):
            search.close()


@cache
def warm_enumeration() -> None:
    """Compile, or load from disk, the loops of the enumeration."""
    tables = (["a"], [["keep", "prune"]], [0.0, 1.0], {"bytes": [2, 1]}, {"bytes": 2})
    problem = Problem(*tables)
    BruteForce().run(problem, Search(problem, solver="warm"))
    enumerate_paired(problem, Search(problem, solver="warm"))


class _State(NamedTuple):
    """State of the enumeration: for each depth, the next option to try and the sums over previous groups."""

    following: Integers  # (G,)
    chosen: Integers  # (G,)
    value: Floats  # (G+1,)
    usage: Floats  # (G+1, K)
    total: Floats  # (G+1, r)

    @classmethod
    def fresh(cls, a: Arrays) -> "_State":
        groups = len(a.starts) - 1
        return cls(
            following=a.starts[:-1].copy(),
            chosen=np.zeros(groups, dtype=np.int64),
            value=np.zeros(groups + 1),
            usage=np.zeros((groups + 1, len(a.limit))),
            total=np.zeros((groups + 1, a.factor.shape[1])),
        )


@compiled
def _enumerate(
    a: Arrays, state: _State, depth: int, steps: int, rounding: float, best: Floats, best_choice: Integers
) -> int:
    """Enumerate ``steps`` options from ``depth`` on; return the depth to continue from, or -1 at the end.

    ``best`` contains the smallest objective and the difference up to which others tie with it.
    """
    following, chosen, value, usage, total = state
    last = len(a.starts) - 2
    while steps > 0 and depth >= 0:
        option = following[depth]
        if option == a.starts[depth + 1]:
            depth -= 1
            continue
        following[depth] += 1
        steps -= 1

        within = True
        for k in range(len(a.limit)):
            usage[depth + 1, k] = usage[depth, k] + a.use[option, k]
            within &= usage[depth + 1, k] <= a.limit[k]
        if not within:
            continue

        objective = value[depth] + a.cost[option]
        for i in range(a.factor.shape[1]):
            objective += total[depth, i] * a.factor[option, i]
            total[depth + 1, i] = total[depth, i] + a.factor[option, i]
        for entry in range(a.indptr[option], a.indptr[option + 1]):
            neighbour = a.indices[entry]
            if neighbour > option:  # later groups are not chosen yet
                break
            if chosen[a.group_of[neighbour]] == neighbour:
                objective += a.data[entry]
        value[depth + 1] = objective
        chosen[depth] = option

        if depth < last:
            depth += 1
            following[depth] = a.starts[depth]
        elif objective < best[0] - best[1]:
            best[0] = objective
            best[1] = max(rounding, TIE * terms(a, chosen, objective))
            best_choice[:] = chosen
    return depth
