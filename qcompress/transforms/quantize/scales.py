"""The scale and zero point of each row (or group of weights) that minimise the quantization error.

A row ``w`` becomes ``s·q`` with whole codes ``-L ≤ q ≤ L - 1``, ``L = 2**(bits - 1)``. The negative side has one code
more, so ``s`` may have either sign, which puts the extra code on the side where the row needs it. The squared error
has many local minima in ``s``: a grid search finds a good one, then codes and their best scale ``<w, q> / <q, q>``
alternate, which never raises the error (Lloyd's method). With a zero point ``z`` a row becomes ``s·(q - z)``; the same
search runs for each of the few codes around the position of 0 in the row's range. It is written in numba, because
evaluating all grid candidates on a row in the cache is an order of magnitude faster than a pass over memory for each.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from qcompress.transforms.threads import over_rows
from solvers.kernels.compiled import compiled

Floats = NDArray[np.float32]

CANDIDATES = {2: 40, 3: 40, 4: 40, 5: 64, 6: 64}
"""Scales to try by the number of bits, for each sign; the error of more bits has more local minima."""

MOST, MOST_RANGES = 128, 64
REFINEMENTS = 4
_fast = partial(compiled, fastmath={"reassoc", "nsz", "contract", "arcp"})  # reordered sums can be vectorised


def best_scales(rows: Floats, bits: int) -> Floats:
    """Return the scale of least squared error of every row.

    Args:
        rows: ``(channels, weights)`` float32, C-contiguous, finite, the largest magnitude of every row 1 (or 0).
        bits: bits per weight, 2 to 16.

    Returns:
        ``(channels,)`` float32, of either sign.

    >>> best_scales(np.array([[1.0, 0.5, -0.5]], dtype=np.float32), bits=2)
    array([-0.5], dtype=float32)
    """
    levels = np.float32(2 ** (bits - 1))
    scales, grid = np.empty(len(rows), dtype=np.float32), _grid(bits, rows.shape[1])

    def find(start: int, stop: int) -> None:
        scales[start:stop] = _best_scales(rows[start:stop], grid, -levels, levels - np.float32(1))

    over_rows(find, *rows.shape)
    return scales


def best_ranges(rows: Floats, bits: int) -> tuple[Floats, Floats]:
    """Return the scale and zero point of least squared error of every row.

    Args:
        rows: ``(channels, weights)`` float32, C-contiguous, finite, the largest magnitude of every row 1 (or 0).
        bits: bits per weight, 2 to 8.

    Returns:
        Scales, not negative, and zero points, whole numbers from 0 to ``2**bits - 1``; ``(channels,)`` float32 each.

    >>> best_ranges(np.array([[1.0, 0.5, 0.0, -0.5]], dtype=np.float32), bits=2)
    (array([0.5], dtype=float32), array([1.], dtype=float32))
    """
    top = 2**bits - 1
    scales, zeros = (np.empty(len(rows), dtype=np.float32) for _ in range(2))
    ratios = _ratios(top / 2, rows.shape[1], min(CANDIDATES.get(bits, MOST), MOST_RANGES))

    def find(start: int, stop: int) -> None:
        scales[start:stop], zeros[start:stop] = _best_ranges(rows[start:stop], ratios, np.float32(top))

    over_rows(find, *rows.shape)
    return scales, zeros


def _grid(bits: int, num_weights: int) -> Floats:
    """The candidate scales for a row whose largest magnitude is 1."""
    reach = 2 ** (bits - 1) - 0.5
    ratios = _ratios(reach, num_weights, CANDIDATES.get(bits, MOST))
    return np.concatenate([ratios, -ratios]).astype(np.float32) / np.float32(reach)


def _ratios(reach: float, num_weights: int, count: int) -> Floats:
    """Fractions of a row's range to try as the range of its codes, which reach ``reach`` steps from the middle.

    A step ``d`` costs about ``n·d²/12`` on a row of n weights. Clipping the range to the fraction r of it saves
    ``1 - r²`` of that and costs at least ``(1 - r)²`` on the largest weight, so it cannot pay below
    ``(1 - c) / (1 + c)`` with ``c = n·d²/12``; a larger c is used because short rows scatter. Their best scale can
    also lie above the range.
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
    for i in range(row.shape[0]):  # a loop over the index is vectorised, one over the row itself is not
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
