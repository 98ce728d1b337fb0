"""Sums of products that keep the contributions of short rows among long ones."""

import numpy as np
from numpy.typing import NDArray

FEW = 2048
"""Numbers of rows up to which `sum_of_products` adds one row after the other."""


def sum_of_products(rows: NDArray[np.float64]) -> float:
    """Sum the products of every two rows of ``rows`` ``(n, r)``, a contiguous array.

    Only sums and products are formed. The shorter ``½(‖Σ rows‖² - Σ‖row‖²)`` loses all products of short rows next to a
    long one, because their difference is smaller than the rounding error of the long row's square.

    >>> sum_of_products(np.array([[1e9, 0.0], [0.0, 0.5], [0.0, 3.0]]))
    1.5
    """
    total = 0.0
    while rows.size > FEW and len(rows) > 2:  # pairs of rows become their sum, which is faster than a running sum
        half = len(rows) // 2
        joined, last = rows[:half] + rows[half : 2 * half], rows[2 * half :]
        total += float(np.vdot(rows[:half], rows[half : 2 * half]))
        if len(last):
            total += float(joined[-1] @ last[0])
            joined[-1] += last[0]
        rows = joined
    return total + float(np.vdot(np.cumsum(rows[:-1], axis=0), rows[1:]))
