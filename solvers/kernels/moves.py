"""Evaluate and make moves, which switch a group's option, in compiled kernels.

`Arrays` contains the data for moves: costs, uses and limits of the budgeted resources, rows of the factor, and the
sparse pair terms as a symmetric CSR matrix (both halves, columns sorted). The state of a kernel is ``chosen`` ``(G,)``
(flat options), ``total`` ``(r,)`` (sum of the chosen rows of the factor), ``field`` ``(V,)`` (for each option, the sum
of its sparse pair terms with the chosen options) and ``usage`` ``(K,)``. Evaluating a move takes ``O(r + K)``, and
making it ``O(r + K + degree)``.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations import Problem
from formulations.problem import limit_of
from solvers.kernels.compiled import compiled

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Arrays(NamedTuple):
    """A problem for compiled kernels: V options in G groups, K budgets, a factor of rank r."""

    starts: Integers  # (G+1,) first flat option of every group
    group_of: Integers  # (V,)
    cost: Floats  # (V,)
    use: Floats  # (V, K), budgeted resources only
    limit: Floats  # (K,) budgets minus fixed uses, with the tolerance of Problem.evaluate
    unit: Floats  # (K,) unit of the excess over each budget
    factor: Floats  # (V, r), the problem's array itself: it can take most of the memory
    indptr: Integers  # (V+1,) rows of the symmetric sparse part
    indices: Integers
    data: Floats


def to_arrays(problem: Problem) -> Arrays:
    """Convert ``problem`` to `Arrays`.

    >>> from formulations import Problem
    >>> to_arrays(Problem(["a"], [["keep", "prune"]], [0, 1], {"bytes": [8, 4]}, {"bytes": 4})).use.tolist()
    [[8.0], [4.0]]
    """
    problem.require_linear_budgets("the kernel of moves")
    num_options = problem.num_options
    budgets = np.array(list(problem.budgets.values()), dtype=np.float64)
    fixed = np.array([problem.fixed.get(name, 0.0) for name in problem.budgets])
    uses = [problem.resources[name] for name in problem.budgets]
    use = np.stack(uses, axis=1) if uses else np.zeros((num_options, 0))
    spread = use.max(axis=0) - use.min(axis=0)
    factor = problem.pairs.factor
    if factor is None:
        factor = np.zeros((num_options, 0))
        factor.flags.writeable = False  # like all others, since kernels are compiled for one kind of array
    half = problem.pairs.sparse
    half = scipy.sparse.csr_array((num_options, num_options)) if half is None else half
    both = scipy.sparse.csr_array(half + half.T)
    both.sort_indices()
    return Arrays(
        starts=np.array(problem.group_offsets, dtype=np.int64),
        group_of=np.array(problem.group_of, dtype=np.int64),
        cost=np.array(problem.cost),
        use=np.ascontiguousarray(use),
        limit=limit_of(budgets) - fixed,
        unit=np.where(spread > 0, spread, 1.0),
        factor=factor,
        indptr=both.indptr.astype(np.int64),
        indices=both.indices.astype(np.int64),
        data=both.data.astype(np.float64),
    )


def summed(function: Any) -> Any:
    """Compile like `compiled`, but allow reordered sums; for short sums over the columns of a factor."""
    return compiled(function, fastmath={"reassoc", "contract"})


@compiled
def begin(a: Arrays, chosen: Integers) -> tuple[Floats, Floats, Floats]:
    """Compute ``(total, field, usage)`` of the chosen flat options."""
    total, field, usage = np.zeros(a.factor.shape[1]), np.zeros(len(a.cost)), np.zeros(len(a.limit))
    for v in chosen:
        total += a.factor[v]
        usage += a.use[v]
        for entry in range(a.indptr[v], a.indptr[v + 1]):
            field[a.indices[entry]] += a.data[entry]
    return total, field, usage


@compiled
def objective(a: Arrays, chosen: Integers, field: Floats) -> float:
    """Compute the objective of the chosen flat options, without the problem's offset.

    A row of the factor is multiplied by the sum of those before it: the sum of all minus itself loses short rows.
    """
    linear, pairs, products = 0.0, 0.0, 0.0
    before = np.zeros(a.factor.shape[1])
    for v in chosen:
        linear += a.cost[v]
        pairs += field[v]
        for k in range(len(before)):
            products += a.factor[v, k] * before[k]
            before[k] += a.factor[v, k]
    return float(linear + 0.5 * pairs + products)


@compiled
def terms(a: Arrays, chosen: Integers, objective: float) -> float:
    """Return the size of what is added up in an objective: its costs, and the sum of its pair terms."""
    size, pairs = 0.0, objective
    for v in chosen:
        size += abs(a.cost[v])
        pairs -= a.cost[v]
    return float(size + abs(pairs))


@compiled
def judge_all(a: Arrays, chosen: Integers) -> tuple[Floats, Floats]:
    """Compute objectives ``(n,)`` without offset, and excess over budgets ``(n,)`` in units, of choices ``(n, G)``."""
    values, excess = np.empty(len(chosen)), np.zeros(len(chosen))
    for i in range(len(chosen)):
        _, field, usage = begin(a, chosen[i])
        values[i] = objective(a, chosen[i], field)
        for k in range(len(usage)):
            excess[i] += max(0.0, usage[k] - a.limit[k]) / a.unit[k]
    return values, excess


@summed
def delta(a: Arrays, total: Floats, field: Floats, old: int, new: int) -> float:
    """Compute the change in the objective from switching one group from ``old`` to ``new``."""
    change = a.cost[new] - a.cost[old] + field[new] - field[old]
    for k in range(a.factor.shape[1]):
        change += (a.factor[new, k] - a.factor[old, k]) * (total[k] - a.factor[old, k])
    return float(change)


@summed
def cross(a: Arrays, old1: int, new1: int, old2: int, new2: int) -> float:
    """Compute the change from two switches in different groups, minus their single deltas."""
    change = 0.0
    for k in range(a.factor.shape[1]):
        change += (a.factor[new1, k] - a.factor[old1, k]) * (a.factor[new2, k] - a.factor[old2, k])
    if len(a.data):
        change += _term(a, new1, new2) - _term(a, new1, old2) - _term(a, old1, new2) + _term(a, old1, old2)
    return float(change)


@compiled
def _term(a: Arrays, u: int, v: int) -> float:
    """Return the sparse pair term of two options (binary search in a row)."""
    low, high = a.indptr[u], a.indptr[u + 1]
    end = high
    while low < high:
        middle = (low + high) // 2
        if a.indices[middle] < v:
            low = middle + 1
        else:
            high = middle
    if low < end and a.indices[low] == v:
        return float(a.data[low])
    return 0.0


@compiled
def switch(a: Arrays, chosen: Integers, total: Floats, field: Floats, usage: Floats, new: int) -> None:
    """Make a move: choose ``new`` in its group, in place."""
    group = a.group_of[new]
    old = chosen[group]
    chosen[group] = new
    for k in range(len(total)):
        total[k] += a.factor[new, k] - a.factor[old, k]
    for k in range(len(usage)):
        usage[k] += a.use[new, k] - a.use[old, k]
    for entry in range(a.indptr[old], a.indptr[old + 1]):
        field[a.indices[entry]] -= a.data[entry]
    for entry in range(a.indptr[new], a.indptr[new + 1]):
        field[a.indices[entry]] += a.data[entry]


@compiled
def fits(a: Arrays, usage: Floats) -> bool:
    """Whether every budget holds."""
    for k in range(len(usage)):  # noqa: SIM110 - numba compiles a plain loop best
        if usage[k] > a.limit[k]:
            return False
    return True
