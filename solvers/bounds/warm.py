"""Compile the inner loops of bounds before the clock of a run starts; see `solvers.kernels.warm`."""

from functools import cache

import numpy as np
import scipy.sparse

from formulations import PairTerms, Problem
from solvers.bounds.duality import dual_bound
from solvers.bounds.pareto_lists import prove
from solvers.bounds.semidefinite import semidefinite_bound
from solvers.bounds.triangles import warm_triangles
from solvers.kernels.warm import warm
from solvers.search import Search


@cache
def warm_bounds() -> None:
    """Compile, or load from disk, the loops of the bounds, of the proof of linear problems, and of `warm`."""
    warm()
    tables = (["a", "b"], [["keep", "prune"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    linear = Problem(*tables)
    prove(linear, Search(linear, solver="warm"), dual_bound(linear), max_states=10)
    half = scipy.sparse.csr_array(([1.0], ([0], [2])), shape=(4, 4))
    for pairs in (PairTerms(factor=np.eye(4)), PairTerms(sparse=half)):
        dual_bound(Problem(*tables, pairs))
    semidefinite_bound(linear, time_limit=0.0)
    warm_triangles()
