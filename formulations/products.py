"""Sums of products that keep what short rows contribute beside long ones."""

import numpy as np
from numpy.typing import NDArray

FEW = 4096
"""Numbers of rows up to which `sum_of_products` adds one row after the other."""


def sum_of_products(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum, in each column of ``rows`` ``(n, r)``, the products of every two rows; returns ``(r,)``.

    Only sums and products are formed. The shorter ``½(‖Σ rows‖² - Σ‖row‖²)`` loses all products of short rows beside a
    long one, because their difference is smaller than the rounding error of the long row's square.

    >>> sum_of_products(np.array([[1e9, 0.0], [0.0, 0.5], [0.0, 3.0]])).tolist()
    [0.0, 1.5]
    """
    total = np.zeros(rows.shape[1])
    while rows.size > FEW and len(rows) > 2:  # pairs of rows become their sum, which is faster than a running sum
        half = len(rows) // 2
        total += np.einsum("nr,nr->r", rows[:half], rows[half : 2 * half])
        joined = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            total += joined[-1] * rows[-1]
            joined[-1] += rows[-1]
        rows = joined
    before = np.cumsum(rows[:-1], axis=0)
    return np.asarray(total + np.einsum("nr,nr->r", before, rows[1:]))
