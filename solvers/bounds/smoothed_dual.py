"""The dual function smoothed by softmin, and a compiled L-BFGS method to maximise it.

At temperature T a minimum is replaced by ``-T·log Σ exp(-cost / T)``, which is smaller by at most ``T·log n``. Every
evaluation also computes the sum of true minima, which is the bound, and the best bound is kept.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from solvers.bounds.messages import NEGLIGIBLE, block_minima
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers

_fast = partial(compiled, fastmath=True)

MEMORY = 10
"""Number of pairs of steps and gradient changes that L-BFGS keeps."""


@_fast
def _dot(a: Floats, b: Floats) -> float:
    """Compute ``a·b`` in this thread; the threads that BLAS would start cost more than they gain on shared cores."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_fast
def _times(matrix: Floats, vector: Floats) -> Floats:
    """Compute ``matrix @ vector`` for a few columns."""
    product = np.zeros(matrix.shape[0])
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            product[i] += matrix[i, j] * vector[j]
    return product


@_fast
def _sum_rows(weight: Floats, matrix: Floats) -> Floats:
    """Compute ``weight @ matrix`` for a few columns; rows with weight 0 are skipped."""
    total = np.zeros(matrix.shape[1])
    for i in range(matrix.shape[0]):
        if weight[i] != 0.0:
            for j in range(matrix.shape[1]):
                total[j] += weight[i] * matrix[i, j]
    return total


@compiled
def group_minima(first: Integers, cost: Floats, temperature: float, share: Floats) -> tuple[float, float]:
    """Sum min and softmin over the groups; ``share`` is set to the softmin's weights."""
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


class DualTerms(NamedTuple):
    """Data of the dual function: G groups, V options, K budgets, a factor of rank r, and blocks of pair terms.

    The last three fields are those of `solvers.bounds.messages.SparseBlocks.arrays`.
    """

    first: Integers  # (G+1,) first option of every group
    cost: Floats  # (V,)
    use: Floats  # (V, K)
    limit: Floats  # (K,)
    factor: Floats  # (V, r)
    row: Integers
    weights: Floats
    option: Integers


class LbfgsMemory(NamedTuple):
    """The latest steps of L-BFGS, in a buffer in which the oldest step is overwritten first."""

    moves: Floats  # (MEMORY, n) changes of the point
    changes: Floats  # (MEMORY, n) changes of the gradient
    curvature: Floats  # (MEMORY,) their products


@compiled
def _smooth(terms: DualTerms, temperature: float, point: Floats, gradient: Floats) -> tuple[float, float]:
    """Return -d with softmin, and d with true minima; ``gradient`` is set to the gradient of the former."""
    budgets, rank = len(terms.limit), terms.factor.shape[1]
    price, direction, messages = point[:budgets], point[budgets : budgets + rank], point[budgets + rank :]
    total = terms.cost + _times(terms.use, price) + _times(terms.factor, direction)
    for m in range(len(messages)):
        total[terms.option[m]] += messages[m]
    share = np.empty(len(terms.cost))
    exact, soft = group_minima(terms.first, total, temperature, share)
    slack = _dot(price, terms.limit) + 0.5 * _dot(direction, direction)
    gradient[:budgets] = terms.limit - _sum_rows(share, terms.use)
    gradient[budgets : budgets + rank] = direction - _sum_rows(share, terms.factor)
    if len(messages):
        marginals = gradient[budgets + rank :]
        block_exact, block_soft = block_minima(terms.row, terms.weights, messages, temperature, marginals)
        exact, soft = exact + block_exact, soft + block_soft
        for m in range(len(messages)):
            marginals[m] -= share[terms.option[m]]
    return slack - soft, exact - slack


@compiled
def _times_inverse(memory: LbfgsMemory, kept: int, descent: Floats, first_scale: float) -> None:
    """Multiply in place by the inverse Hessian estimated from ``kept`` steps, or by ``first_scale`` without any.

    Nocedal & Wright, algorithm 7.4.
    """
    moves, changes, curvature = memory
    alpha = np.zeros(MEMORY)
    oldest = max(0, kept - MEMORY)
    for i in range(kept - 1, oldest - 1, -1):
        slot = i % MEMORY
        alpha[slot] = _dot(moves[slot], descent) / curvature[slot]
        descent -= alpha[slot] * changes[slot]
    if kept:
        slot = (kept - 1) % MEMORY
        descent *= curvature[slot] / _dot(changes[slot], changes[slot])
    else:
        descent *= first_scale
    for i in range(oldest, kept):
        slot = i % MEMORY
        descent += (alpha[slot] - _dot(changes[slot], descent) / curvature[slot]) * moves[slot]


@compiled
def descend(
    terms: DualTerms,
    temperature: float,
    point: Floats,
    best: Floats,
    best_point: Floats,
    steps: int,
    enough: float,
) -> None:
    """Minimise ``_smooth`` from ``point`` in place by L-BFGS (Nocedal & Wright, algorithm 7.5), with prices ≥ 0.

    ``best`` and ``best_point`` keep the largest d seen; a d above ``enough`` ends the descent.
    """
    size, budgets = len(point), len(terms.limit)
    memory, kept = LbfgsMemory(np.zeros((MEMORY, size)), np.zeros((MEMORY, size)), np.zeros(MEMORY)), 0
    gradient, new_gradient = np.empty(size), np.empty(size)
    tolerance = 1e-3 * temperature * (len(terms.first) - 1)
    value, exact = _smooth(terms, temperature, point, gradient)
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
        _times_inverse(memory, kept, descent, temperature / (1e-300 + np.sqrt(_dot(gradient, gradient))))
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
            new_value, exact = _smooth(terms, temperature, new_point, new_gradient)
            if new_value <= value + 1e-4 * length * fall:
                break
            length *= 0.5
            if length < 1e-10:
                return
        move, change = new_point - point, new_gradient - gradient
        if _dot(move, change) > 1e-12 * _dot(change, change) > 1e-200:
            slot = kept % MEMORY
            memory.moves[slot], memory.changes[slot], memory.curvature[slot] = move, change, _dot(move, change)
            kept += 1
        point[:], gradient[:], value = new_point, new_gradient, new_value
