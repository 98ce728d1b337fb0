"""List the pair terms of a `Problem`, for the forms that need every coupling explicitly."""

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import EncodingError
from formulations.problem import Problem

MAX_PAIRS = 20_000_000
"""Maximum number of pairs of options that a model may couple (about 1 GB while it is built)."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Couplings = tuple[Integers, Integers, Floats]
"""Pair terms ``(u, v, value)`` between options of different groups, u < v."""


def pair_couplings(problem: Problem, *, complete: bool = False) -> Couplings:
    """Return the pair terms as ``(u, v, value)`` with u < v, with the products of a factor expanded.

    Args:
        problem: any problem.
        complete: whether to count the pairs as in a model that couples all options.

    Raises:
        EncodingError: there are more than `MAX_PAIRS` pairs.
    """
    num_options = problem.num_options
    if (count := count_couplings(problem, complete=complete)) > MAX_PAIRS:
        why = "a budget by slack bits couples all options" if complete else "a factor couples all options"
        raise EncodingError(
            f"{why}: {num_options} options make {count} pairs, more than {MAX_PAIRS}; "
            "give prices, keep the pair terms sparse, or use a solver that accepts a factor ('anneal', 'auto')"
        )
    sparse = problem.pairs.sparse
    half = scipy.sparse.coo_array((num_options, num_options)) if sparse is None else scipy.sparse.coo_array(sparse)
    rows, columns, values = half.row.astype(np.int64), half.col.astype(np.int64), half.data.astype(np.float64)
    if problem.pairs.factor is None or problem.pairs.rank == 0:
        return rows, columns, values
    product = problem.pairs.factor @ problem.pairs.factor.T
    product[rows, columns] += values
    after = problem.group_of[:, None] < problem.group_of[None, :]  # options are numbered group after group
    rows, columns = np.nonzero(after)
    return rows, columns, product[after]


def count_couplings(problem: Problem, *, complete: bool = False) -> int:
    """Count the pairs of options that a model couples: all of them if ``complete`` or with a factor."""
    if problem.pairs.rank > 0 or complete:
        return problem.num_options * (problem.num_options - 1) // 2
    return int(problem.pairs.num_sparse)


def pairs_within_groups(group_offsets: Integers) -> tuple[Integers, Integers]:
    """Return all pairs ``u < v`` of options of the same group."""
    sizes = np.diff(group_offsets)
    first = [np.zeros(0, dtype=np.int64)]
    second = [np.zeros(0, dtype=np.int64)]
    for size in np.unique(sizes):
        starts = group_offsets[:-1][sizes == size]
        i, j = np.triu_indices(size, 1)
        first.append((starts[:, None] + i).ravel())
        second.append((starts[:, None] + j).ravel())
    return np.concatenate(first), np.concatenate(second)
