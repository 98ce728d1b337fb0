"""Compile the inner loops of heuristic solvers before the clock of a run starts.

The first call on a machine takes some seconds (numba stores the result on disk), which should not count against a short
time limit. Later calls in the same process return immediately.
"""

from functools import cache

import numpy as np

from formulations import Problem
from solvers.kernels.cooling import NO_BEST, Schedule, cool
from solvers.kernels.crossing import cross_parts
from solvers.kernels.local_search import descend_flat, polish, polish_flat
from solvers.kernels.moves import begin, delta, fits, judge_all, to_arrays
from solvers.kernels.repair import warm_repair
from solvers.kernels.sweeping import cool_in_sweeps


def _tiny() -> Problem:
    return Problem(["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})


@cache
def warm_descent() -> None:
    """Compile, or load from disk, the loops of repair and polish."""
    problem = _tiny()
    warm_repair(to_arrays(problem), np.array([0, 2]))
    polish(problem, [0, 1])


@cache
def warm() -> None:
    """Compile, or load from disk, the loops of repair, polish, annealing and the evaluation of many choices."""
    warm_descent()
    problem, chosen = _tiny(), np.array([0, 3])
    a = to_arrays(problem)
    total, field, usage = begin(a, chosen)
    delta(a, total, field, 0, 1)
    fits(a, usage)
    polish_flat(a, chosen, 1)
    descend_flat(a, chosen)
    judge_all(a, chosen[None])
    state, schedule = np.ones(1, dtype=np.uint64), Schedule(1.0, 1.0, 1, 0.01)
    cool(a, np.arange(2), chosen.copy(), np.ones(1), state, schedule, chosen.copy(), NO_BEST)
    unlimited = to_arrays(problem.derived(budgets={}))
    cool_in_sweeps(unlimited, np.arange(2), chosen.copy(), state, schedule, chosen.copy(), NO_BEST)
    cross_parts(unlimited, chosen, chosen.copy(), np.zeros(2, dtype=np.int64))
