"""A `Problem` as plain arrays, the form that compiled loops take.

Only budgeted resources are kept. Missing parts become arrays of size zero, so that one loop serves every kind of
problem: no budget is K = 0, no factor is r = 0, no sparse part has no entries.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.problem import BUDGET_TOLERANCE

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Budgets(NamedTuple):
    """Uses and limits of the budgeted resources.

    Attributes:
        use: ``(V, K)`` use of every option.
        limit: ``(K,)`` what a usage is compared with: the budget with the judge's rounding slack.
    """

    use: FloatArray
    limit: FloatArray


class Sparse(NamedTuple):
    """The sparse pair terms, row by row or column by column.

    The terms of option v are the entries ``start[v]:start[v + 1]`` of ``partner`` (the other option) and ``data``.
    """

    start: IntArray
    partner: IntArray
    data: FloatArray


def budget_arrays(problem: Problem) -> Budgets:
    """The budgeted resources, in the order of ``problem.budgets``.

    >>> problem = Problem(["a"], [["x", "y"]], [0, 1], {"bytes": [8, 4]}, {"bytes": 4})
    >>> budget_arrays(problem).use.shape
    (2, 1)
    """
    use = np.empty((problem.num_options, len(problem.budgets)))
    for k, name in enumerate(problem.budgets):
        use[:, k] = problem.resources[name]
    budget = np.array(list(problem.budgets.values()), dtype=np.float64)
    return Budgets(use, budget + BUDGET_TOLERANCE * np.abs(budget))


def factor_array(problem: Problem) -> FloatArray:
    """The factor ``(V, r)``, with r = 0 when there is none."""
    factor = problem.pairs.factor
    return np.zeros((problem.num_options, 0)) if factor is None else factor


def sparse_columns(problem: Problem) -> Sparse:
    """The sparse part column by column: for option v its partners u < v."""
    return _compressed(problem.pairs.sparse.tocsc()) if problem.pairs.num_sparse else _no_entries(problem)


def sparse_neighbours(problem: Problem) -> Sparse:
    """The sparse part made symmetric: for option v all its partners, before and behind it."""
    sparse = problem.pairs.sparse
    return _compressed((sparse + sparse.T).tocsr()) if problem.pairs.num_sparse else _no_entries(problem)


def _compressed(matrix: Any) -> Sparse:
    return Sparse(matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data)


def _no_entries(problem: Problem) -> Sparse:
    return Sparse(np.zeros(problem.num_options + 1, np.int64), np.zeros(0, np.int64), np.zeros(0))
