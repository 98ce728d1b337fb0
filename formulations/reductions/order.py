"""State a problem with its groups in another order."""

from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.validation import frozen


def in_order(problem: Problem, order: ArrayLike) -> Problem:
    """Return the same problem with its groups in another order: group i is the problem's group ``order[i]``.

    Args:
        problem: any problem.
        order: ``(G,)`` indices of the groups, each once.

    Raises:
        InvalidProblemError: ``order`` does not name every group once.

    >>> problem = Problem(["a", "b"], [["x"], ["y", "z"]], [1, 2, 3], {"bytes": [4, 5, 6]}, {})
    >>> swapped = in_order(problem, [1, 0])
    >>> swapped.groups, swapped.cost.tolist(), swapped.resources["bytes"].tolist()
    (('b', 'a'), [2.0, 3.0, 1.0], [5.0, 6.0, 4.0])
    """
    groups = np.asarray(order, dtype=np.int64)
    if not np.array_equal(np.sort(groups), np.arange(problem.num_groups)):
        raise InvalidProblemError(f"an order names each of {problem.num_groups} groups once, found {groups.tolist()}")
    sizes = np.diff(problem.group_offsets)[groups]
    group_offsets = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.repeat(problem.group_offsets[:-1][groups] - group_offsets[:-1], sizes)
    options = np.arange(problem.num_options) + starts

    def terms(matrix: Any) -> Any:
        symmetric = scipy.sparse.csr_array(matrix + matrix.T)
        return scipy.sparse.csr_array(scipy.sparse.triu(symmetric[options][:, options], 1))

    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    return problem.derived(
        groups=tuple(problem.groups[group] for group in groups.tolist()),
        options=tuple(problem.options[group] for group in groups.tolist()),
        cost=frozen(problem.cost[options]),
        resources=MappingProxyType({name: frozen(use[options]) for name, use in problem.resources.items()}),
        pairs=PairTerms.trusted(
            sparse=None if sparse is None else terms(sparse),
            factor=None if factor is None else frozen(factor[options]),
        ),
        resource_pairs=MappingProxyType({name: terms(matrix) for name, matrix in problem.resource_pairs.items()}),
        group_offsets=frozen(group_offsets.astype(np.int64)),
        group_of=frozen(np.repeat(np.arange(problem.num_groups), sizes)),
    )
