"""Leave out options that are too expensive for any choice as good as a known one.

A cost of 1e12 that forbids an option leaves no digits for costs of about 1 in a problem scaled by its largest number.
`cut_off` compares, before any scaling, each option with a known feasible choice: per group, it adds up how much every
other group could gain on that choice. An option that loses more than all of this together is in no choice as good as
the known one, and is left out. A pair term that is larger is lowered to a size that is still too large.
"""

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.reductions.presolve import drop_never_feasible
from formulations.reductions.restriction import Restriction, restrict

ROUNDING = 2.0**-44
"""Rounding error of a sum, relative to the sum of its absolute values, with a wide margin."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def cut_off(problem: Problem, choice: ArrayLike) -> Restriction:
    """Leave out all options that no choice as good as ``choice`` takes, and lower all pair terms that none has.

    Choices with a lowered pair term get a smaller objective, which is still at least that of ``choice``; all others
    keep theirs. Bounds and better choices of the reduced problem therefore hold for the original.

    Args:
        problem: any problem.
        choice: ``(G,)`` a feasible choice.

    >>> problem = Problem(["a", "b"], [["x", "y", "z"]] * 2, [4, 0, 1e15, 2, 1e12, -1], {}, {})
    >>> cut_off(problem, [0, 0]).problem.cost.tolist()
    [4.0, 0.0, 2.0, -1.0]
    """
    chosen, known = problem.flat(choice), problem.evaluate(choice).objective
    stated, keep = problem.without_fixed(), np.ones(problem.num_options, dtype=bool)
    while True:
        before = int(keep.sum())
        drop_never_feasible(stated, keep, list(stated.budgets))
        keep[chosen] = True
        excess, gain = _excess(problem, keep, chosen)
        keep &= excess <= 0.0
        keep[chosen] = True
        if keep.sum() == before:
            break
    return restrict(_lowered(problem, keep, gain), keep, outside=known)


def _excess(problem: Problem, keep: Flags, chosen: NDArray[np.int64]) -> tuple[Floats, float]:
    """Return how much every option loses beyond what the other groups can gain, and what all groups can gain together.

    Both allow for rounding errors. With a factor, ``½‖F_v‖²`` is subtracted from the costs, which leaves the pair terms
    ``½‖Fᵀx‖²``, at least 0.
    """
    cost, error = problem.cost, np.zeros(problem.num_options)
    if problem.pairs.factor is not None:
        square = 0.5 * np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor)
        cost, error = cost - square, np.where(square > 0.0, ROUNDING * (np.abs(cost) + square), 0.0)
    starts, group_of = problem.group_offsets[:-1], problem.group_of
    least = np.minimum.reduceat(np.where(keep, cost - error, np.inf), starts)
    gain = cost[chosen] + error[chosen] - least  # a difference of two floats has a small relative error
    total = (float(gain.sum()) + _pair_gain(problem, keep, chosen)) * (1.0 + ROUNDING)
    loss = cost - cost[chosen][group_of]
    rest = np.maximum(total - gain[group_of], 0.0) + ROUNDING * total
    return loss - ROUNDING * np.abs(loss) - error - error[chosen][group_of] - rest, total


def _pair_gain(problem: Problem, keep: Flags, chosen: NDArray[np.int64]) -> float:
    """Return how much smaller than those of the chosen options any pair terms can be, allowing for rounding errors."""
    gain = size = 0.0
    if problem.pairs.factor is not None:
        rows = problem.pairs.factor[chosen]
        total = rows.sum(axis=0)
        gain += 0.5 * float(total @ total)
        size += 0.5 * float(np.square(np.abs(rows).sum(axis=0)).sum())
    if problem.pairs.num_sparse:
        x = np.zeros(problem.num_options)
        x[chosen] = 1.0
        terms = problem.pairs.sparse.tocoo()
        row, column = terms.coords
        present = terms.data * x[row] * x[column]
        blocks = problem.group_of[row].astype(np.int64) * problem.num_groups + problem.group_of[column]
        negative = keep[row] & keep[column] & (terms.data < 0.0)
        order = np.argsort(blocks[negative], kind="stable")
        blocks, data = blocks[negative][order], terms.data[negative][order]
        begins = np.flatnonzero(np.diff(blocks, prepend=-1))
        least = float(np.minimum.reduceat(data, begins).sum()) if len(begins) else 0.0
        gain += float(present.sum()) - least
        size += float(np.abs(present).sum()) - least
    return gain + ROUNDING * size


def _lowered(problem: Problem, keep: Flags, gain: float) -> Problem:
    """Lower the pair terms between kept options that exceed twice the gain of all groups together to that."""
    if not problem.pairs.num_sparse:
        return problem
    sparse = problem.pairs.sparse
    row = np.repeat(np.arange(problem.num_options), np.diff(sparse.indptr))
    data = np.where(keep[row] & keep[sparse.indices], np.minimum(sparse.data, 2.0 * gain), 0.0)
    lowered = scipy.sparse.csr_array((data, sparse.indices, sparse.indptr), shape=sparse.shape, copy=True)
    lowered.eliminate_zeros()
    return problem.derived(pairs=PairTerms.trusted(sparse=lowered, factor=problem.pairs.factor))
