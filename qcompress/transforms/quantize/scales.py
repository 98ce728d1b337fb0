"""The scale of each row (or group of weights) that quantization loses least with, and its zero point.

A row ``w`` becomes ``s·q`` with whole codes ``-L ≤ q ≤ L - 1``, ``L = 2**(bits - 1)``. There is one code more on the
negative side, so the sign of ``s`` is free: it turns the longer side to where the row needs it. The squared error
has many local minima in ``s``: a grid finds the right one, then codes and their best scale ``<w, q> / <q, q>``
alternate, which never raises the error (Lloyd's method). With a zero point ``z`` a row becomes ``s·(q - z)``: for each
of the few codes next to where 0 lies in the row's range the search is the same. In numba, because one pass over a row
that stays in the cache beats a pass over memory for each of the grid's candidates by an order of magnitude.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from solvers.kernels.compiled import compiled

Floats = NDArray[np.float32]

CANDIDATES = 128
REFINEMENTS = 4
_fast = partial(compiled, fastmath={"reassoc", "nsz", "contract", "arcp"})  # sums in any order: loops run on vectors


def best_scales(rows: Floats, bits: int) -> Floats:
    """The scale of least squared error of every row.

    Args:
        rows: ``(channels, weights)`` float32, C-contiguous, finite, the largest magnitude of every row 1 (or 0).
        bits: 2 to 16.

    Returns:
        ``(channels,)`` float32, of either sign.

    >>> best_scales(np.array([[1.0, 0.5, -0.5]], dtype=np.float32), bits=2)
    array([-0.5], dtype=float32)
    """
    levels = np.float32(2 ** (bits - 1))
    scales: Floats = _best_scales(rows, _grid(bits, rows.shape[1]), -levels, levels - np.float32(1))
    return scales


def best_ranges(rows: Floats, bits: int) -> tuple[Floats, Floats]:
    """The scale and zero point of least squared error of every row.

    Args:
        rows: ``(channels, weights)`` float32, C-contiguous, finite, the largest magnitude of every row 1 (or 0).
        bits: 2 to 8.

    Returns:
        Scales, not negative, and zero points, whole numbers from 0 to ``2**bits - 1``; ``(channels,)`` float32 each.

    >>> best_ranges(np.array([[1.0, 0.5, 0.0, -0.5]], dtype=np.float32), bits=2)
    (array([0.5], dtype=float32), array([1.], dtype=float32))
    """
    top = 2**bits - 1
    scales, zeros = _best_ranges(rows, _ratios(top / 2, rows.shape[1], CANDIDATES // 2), np.float32(top))
    return scales, zeros


def _grid(bits: int, num_weights: int) -> Floats:
    """Scales to try, for a row whose largest magnitude is 1."""
    reach = 2 ** (bits - 1) - 0.5
    ratios = _ratios(reach, num_weights, CANDIDATES)
    return np.concatenate([ratios, -ratios]).astype(np.float32) / np.float32(reach)


def _ratios(reach: float, num_weights: int, count: int) -> Floats:
    """Parts of the range of a row to try as the range of its codes, of ``reach`` steps to either side of its middle.

    A step ``d`` loses about ``n·d²/12`` on a row of n. Clipping the range to the part r of it saves ``1 - r²`` of
    that and loses at least ``(1 - r)²`` on the largest weight, so it cannot pay below ``(1 - c) / (1 + c)`` with
    ``c = n·d²/12``; c is taken larger, because short rows scatter. Their best scale can also lie above the range.
    """
    c = (num_weights + 24) / (6 * reach**2)
    return np.linspace(max(0.05, (1 - c) / (1 + c)), 1 + 1.2 / num_weights**0.5, count).astype(np.float32)


@compiled
def _best_scales(rows, grid, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    scales = np.zeros(rows.shape[0], dtype=np.float32)
    for i in range(rows.shape[0]):
        least = np.float32(np.inf)
        for scale in grid:
            error = _squared_error(rows[i], scale, low, high)
            if error < least:
                least, scales[i] = error, scale
        for _ in range(REFINEMENTS):
            scales[i] = _refitted(rows[i], scales[i], low, high)
    return scales


@_fast
def _squared_error(row, scale, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    inverse, total = np.float32(1) / scale, np.float32(0)
    for i in range(row.shape[0]):  # over an index: iterating the row itself would not run on vectors
        difference = min(max(np.rint(row[i] * inverse), low), high) * scale - row[i]
        total += difference * difference
    return total


@_fast
def _refitted(row, scale, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    inverse, product, square = np.float32(1) / scale, np.float32(0), np.float32(0)
    for i in range(row.shape[0]):
        code = min(max(np.rint(row[i] * inverse), low), high)
        product += code * row[i]
        square += code * code
    return product / square if product != 0 else scale


@compiled
def _best_ranges(rows, ratios, top):  # type: ignore[no-untyped-def]  # pragma: no cover
    scales, zeros = np.zeros(rows.shape[0], dtype=np.float32), np.zeros(rows.shape[0], dtype=np.float32)
    for i in range(rows.shape[0]):
        least_weight, largest_weight = min(rows[i].min(), np.float32(0)), max(rows[i].max(), np.float32(0))
        if largest_weight == least_weight:
            continue
        width, least = largest_weight - least_weight, np.float32(np.inf)
        middle = np.floor(-least_weight / width * top)
        for zero in range(max(middle - 1, 0), min(middle + 2, top) + 1):
            low = np.float32(-zero)
            for ratio in ratios:
                scale = width * ratio / top
                error = _squared_error(rows[i], scale, low, low + top)
                if error < least:
                    least, scales[i], zeros[i] = error, scale, zero
        for _ in range(REFINEMENTS):
            scales[i] = _refitted(rows[i], scales[i], -zeros[i], top - zeros[i])
    return scales, zeros
