"""Pair terms that agree with measured costs; `qcompress.formulation` gives the reason."""

import numpy as np
from numpy.typing import NDArray

PAIR_STRENGTH = 0.5
"""Default strength of the pair terms."""


def consistent_rows(factor: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shrink each row of ``factor`` ``(V, r)`` until half its squared norm is at most its option's ``cost``.

    The row of an option with a cost of zero or less becomes zero: there is no loss that another change could cancel.

    >>> consistent_rows(np.array([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.array([0.5, 8.0, -0.1])).tolist()
    [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    """
    half_square = 0.5 * np.square(factor).sum(axis=1)
    reach = np.maximum(cost, 0.0)
    scale = np.sqrt(np.divide(reach, half_square, out=np.ones_like(reach), where=half_square > reach))
    return np.asarray(factor * scale[:, None])
