"""Products of functions of one or two decisions, as the constant, linear and pair terms of a resource."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from qcompress.errors import ModelError

Function = tuple[int, NDArray[np.float64]]
"""Index of a decision, and the value for each of its options."""

Addends = list[tuple[float, tuple[Function, ...]]]
"""A sum of products: factor and functions of each."""


class Tabulated:
    """The sum of products of functions of decisions.

    Args:
        sizes: number of options of every decision.

    >>> table = Tabulated([2, 2])
    >>> table.add([(3.0, ((0, np.array([1.0, 2.0])), (1, np.array([1.0, 5.0])))), (7.0, ())])
    >>> constant, linear, pairs = table.terms()
    >>> constant, linear.tolist(), pairs.toarray()[:2, 2:].tolist()
    (7.0, [0.0, 0.0, 0.0, 0.0], [[3.0, 15.0], [6.0, 30.0]])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *sizes])
        self._constant, self._linear = 0.0, np.zeros(self._starts[-1])
        self._pairs: dict[tuple[int, int], NDArray[np.float64]] = {}

    def add(self, addends: Addends) -> None:
        """Add products.

        Raises:
            ModelError: a product has functions of more than two decisions.
        """
        for factor, functions in addends:
            by_decision: dict[int, NDArray[np.float64]] = {}
            for decision, values in functions:
                by_decision[decision] = by_decision[decision] * values if decision in by_decision else values
            if len(by_decision) > 2:
                raise ModelError(f"a use depends on {len(by_decision)} decisions together; at most two are supported")
            if not by_decision:
                self._constant += factor
            elif len(by_decision) == 1:
                ((decision, values),) = by_decision.items()
                self._linear[self._starts[decision] : self._starts[decision + 1]] += factor * values
            else:
                (first, rows), (second, columns) = sorted(by_decision.items())
                block = factor * np.outer(rows, columns)
                known = self._pairs.get((first, second))
                self._pairs[first, second] = block if known is None else known + block

    def terms(self) -> tuple[float, NDArray[np.float64], scipy.sparse.csr_array]:
        """Return the constant, the ``(V,)`` linear and the ``(V, V)`` strictly upper triangular pair part."""
        rows, columns, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
        for (first, second), block in self._pairs.items():
            rows.append(np.repeat(self._starts[first] + np.arange(block.shape[0]), block.shape[1]))
            columns.append(np.tile(self._starts[second] + np.arange(block.shape[1]), block.shape[0]))
            values.append(block.ravel())
        places = (np.concatenate(rows), np.concatenate(columns))
        shape = (self._starts[-1], self._starts[-1])
        matrix = scipy.sparse.coo_array((np.concatenate(values), places), shape=shape)
        return self._constant, self._linear, scipy.sparse.csr_array(matrix)
