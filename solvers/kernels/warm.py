"""Compile the inner loops of heuristic solvers before the clock of a run starts.

The first call on a machine takes some seconds (numba stores the result on disk), which should not count against a short
time limit. Later calls in the same process return immediately.
"""

from functools import cache

import numpy as np

from formulations import Problem
from solvers.kernels.cooling import NO_BEST, Schedule, cool
from solvers.kernels.local_search import descend_flat, polish_flat
from solvers.kernels.moves import judge_all, to_arrays
from solvers.kernels.repair import repair_flat


@cache
def warm() -> None:
    """Compile, or load from disk, the loops of repair, polish, annealing and the evaluation of many choices."""
    problem = Problem(["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    a, chosen = to_arrays(problem), np.array([0, 2])
    repair_flat(a, chosen)
    polish_flat(a, chosen, 1)
    descend_flat(a, chosen)
    judge_all(a, chosen[None])
    state = np.ones(1, dtype=np.uint64)
    cool(a, np.arange(2), chosen.copy(), np.ones(1), state, Schedule(1.0, 1.0, 1, 0.01), chosen.copy(), NO_BEST)
