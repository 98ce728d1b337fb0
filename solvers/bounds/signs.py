"""Problems of two options a group and no budgets, as a quadratic form in signs ``s = (1, ±1, …)``.

Option 0 of a group is the sign -1 and option 1 is +1. The objective of a choice is ``constant + s·C·s``, so it is
linear in the matrix ``s·sᵀ``, whose diagonal is 1 (Goemans & Williamson, doi:10.1145/227683.227684).
"""

from dataclasses import dataclass

import numpy as np

from formulations import Problem
from solvers.kernels.moves import Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SignForm:
    """The objective ``constant + s·C·s`` of a problem with G groups of two options.

    Attributes:
        matrix: ``(G + 1, G + 1)`` C, symmetric with a zero diagonal; index 0 is the constant sign.
        constant: the part of the objective that no choice changes.
    """

    matrix: Floats
    constant: float

    @classmethod
    def of(cls, problem: Problem) -> "SignForm":
        """State a problem in signs; every group must have two options, and no budget may be given.

        >>> problem = Problem(["a", "b"], [["0", "1"]] * 2, [0, 3, 0, 1], {}, {})
        >>> form = SignForm.of(problem)
        >>> form.constant, form.matrix[0].tolist()
        (2.0, [0.0, 0.75, 0.25])
        """
        products = dense_products(problem)
        zeros, ones = slice(0, None, 2), slice(1, None, 2)
        none, mixed = products[zeros, zeros], products[ones, zeros]
        both = products[ones, ones] - mixed - mixed.T + none
        linear = problem.cost[ones] - problem.cost[zeros] + (mixed - none).sum(axis=1)
        matrix = np.zeros((problem.num_groups + 1, problem.num_groups + 1))
        matrix[1:, 1:] = both / 8
        matrix[0, 1:] = matrix[1:, 0] = linear / 4 + both.sum(axis=1) / 8
        constant = problem.offset + problem.cost[zeros].sum() + 0.5 * none.sum() + 0.5 * linear.sum() + both.sum() / 8
        return cls(matrix=matrix, constant=float(constant))


def dense_products(problem: Problem) -> Floats:
    """Return the pair terms of different groups as one symmetric matrix ``(V, V)``."""
    pairs = problem.pairs
    dense = np.zeros((problem.num_options, problem.num_options))
    if pairs.factor is not None:
        dense += pairs.factor @ pairs.factor.T
    if pairs.sparse is not None:
        half = pairs.sparse.toarray()
        dense += half + half.T
    dense[problem.group_of[:, None] == problem.group_of[None, :]] = 0.0
    return dense
