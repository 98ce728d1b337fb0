"""The dual function made smooth by softmin, and L-BFGS on it, compiled as a whole.

At temperature T a minimum is replaced by ``-T·log Σ exp(-cost / T)``, which is below it by at most ``T·log n``. Every
evaluation also gives the sum with true minima, which is the bound, and the best one is kept.
"""

from functools import partial

import numpy as np

from solvers.bounds.messages import NEGLIGIBLE, block_minima
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers

_fast = partial(compiled, fastmath=True)

MEMORY = 10
"""Pairs of steps and gradient changes that L-BFGS keeps."""


@_fast
def _dot(a: Floats, b: Floats) -> float:
    """``a·b`` in this thread: BLAS would start threads, which loses more than it gains where cores are shared."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_fast
def _times(matrix: Floats, vector: Floats) -> Floats:
    """``matrix @ vector``, for a few columns."""
    product = np.zeros(matrix.shape[0])
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            product[i] += matrix[i, j] * vector[j]
    return product


@_fast
def _sum_rows(weight: Floats, matrix: Floats) -> Floats:
    """``weight @ matrix``, for a few columns; rows of weight 0 are skipped."""
    total = np.zeros(matrix.shape[1])
    for i in range(matrix.shape[0]):
        if weight[i] != 0.0:
            for j in range(matrix.shape[1]):
                total[j] += weight[i] * matrix[i, j]
    return total


@compiled
def group_minima(first: Integers, cost: Floats, temperature: float, share: Floats) -> tuple[float, float]:
    """Sum over the groups of min and of softmin; ``share`` becomes the softmin's weights."""
    exact = soft = 0.0
    for group in range(len(first) - 1):
        begin, end = first[group], first[group + 1]
        least = cost[begin]
        for v in range(begin + 1, end):
            least = min(least, cost[v])
        total = 0.0
        for v in range(begin, end):
            height = (cost[v] - least) / temperature
            share[v] = np.exp(-height) if height < NEGLIGIBLE else 0.0
            total += share[v]
        for v in range(begin, end):
            share[v] /= total
        exact += least
        soft += least - temperature * np.log(total)
    return exact, soft


@compiled
def _smooth(
    first: Integers,
    cost: Floats,
    use: Floats,
    limit: Floats,
    factor: Floats,
    row: Integers,
    weights: Floats,
    option: Integers,
    temperature: float,
    point: Floats,
    gradient: Floats,
) -> tuple[float, float]:
    """-d with softmin, and d with true minima; ``gradient`` is that of the former."""
    budgets, rank = len(limit), factor.shape[1]
    price, direction, messages = point[:budgets], point[budgets : budgets + rank], point[budgets + rank :]
    total = cost + _times(use, price) + _times(factor, direction)
    for m in range(len(messages)):
        total[option[m]] += messages[m]
    share = np.empty(len(cost))
    exact, soft = group_minima(first, total, temperature, share)
    slack = _dot(price, limit) + 0.5 * _dot(direction, direction)
    gradient[:budgets] = limit - _sum_rows(share, use)
    gradient[budgets : budgets + rank] = direction - _sum_rows(share, factor)
    if len(messages):
        marginals = gradient[budgets + rank :]
        block_exact, block_soft = block_minima(row, weights, messages, temperature, marginals)
        exact, soft = exact + block_exact, soft + block_soft
        for m in range(len(messages)):
            marginals[m] -= share[option[m]]
    return slack - soft, exact - slack


@compiled
def descend(
    first: Integers,
    cost: Floats,
    use: Floats,
    limit: Floats,
    factor: Floats,
    row: Integers,
    weights: Floats,
    option: Integers,
    temperature: float,
    point: Floats,
    best: Floats,
    best_point: Floats,
    steps: int,
    enough: float,
) -> None:
    """L-BFGS (Nocedal & Wright, algorithm 7.5) on ``_smooth`` from ``point``, in place; prices stay at or above 0.

    ``best`` and ``best_point`` keep the best d seen; a d above ``enough`` ends the descent.
    """
    size, budgets = len(point), len(limit)
    moves, changes, curvature = np.zeros((MEMORY, size)), np.zeros((MEMORY, size)), np.zeros(MEMORY)
    gradient, new_gradient, alpha = np.empty(size), np.empty(size), np.zeros(MEMORY)
    kept = 0
    tolerance = 1e-3 * temperature * (len(first) - 1)
    value, exact = _smooth(first, cost, use, limit, factor, row, weights, option, temperature, point, gradient)
    earlier = value + 1.0 + 1e3 * abs(value)
    for step in range(steps):
        if exact > best[0]:
            best[0] = exact
            best_point[:] = point
            if exact > enough:
                return
        if step % 10 == 9:
            if earlier - value < tolerance:
                return
            earlier = value
        descent = -gradient
        for k in range(budgets):
            if point[k] <= 0.0 and gradient[k] > 0.0:
                descent[k] = 0.0
        for i in range(kept - 1, max(-1, kept - 1 - MEMORY), -1):
            at = i % MEMORY
            alpha[at] = _dot(moves[at], descent) / curvature[at]
            descent -= alpha[at] * changes[at]
        if kept:
            at = (kept - 1) % MEMORY
            descent *= curvature[at] / _dot(changes[at], changes[at])
        else:
            descent *= temperature / (1e-300 + np.sqrt(_dot(gradient, gradient)))
        for i in range(max(0, kept - MEMORY), kept):
            at = i % MEMORY
            descent += (alpha[at] - _dot(changes[at], descent) / curvature[at]) * moves[at]
        for k in range(budgets):
            if point[k] <= 0.0 and (gradient[k] > 0.0 or descent[k] < 0.0):
                descent[k] = 0.0
        fall = _dot(gradient, descent)
        if not fall < -1e-3 * tolerance:
            return
        length = 1.0
        while True:
            new_point = point + length * descent
            for k in range(budgets):
                new_point[k] = max(0.0, new_point[k])
            new_value, exact = _smooth(
                first, cost, use, limit, factor, row, weights, option, temperature, new_point, new_gradient
            )
            if new_value <= value + 1e-4 * length * fall:
                break
            length *= 0.5
            if length < 1e-10:
                return
        move, change = new_point - point, new_gradient - gradient
        if _dot(move, change) > 1e-12 * _dot(change, change) > 1e-200:
            at = kept % MEMORY
            moves[at], changes[at], curvature[at] = move, change, _dot(move, change)
            kept += 1
        point[:], gradient[:], value = new_point, new_gradient, new_value
