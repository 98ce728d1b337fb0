"""Remove dominated options, which another option of their group can replace whatever the other groups choose.

An option is removed when another one uses no more of any budgeted resource and has no greater objective for any choice
of the other groups. Without pair terms this is a comparison of costs. With pair terms it needs an upper bound on how
much the pair terms of one option exceed those of the other, over all choices of the other groups:

* up to `EXACT_OPTIONS` options, the sum over the other groups of the maximum difference. Trial choices, for which the
  replacement must not be worse, first rule out most pairs;
* beyond, Cauchy-Schwarz, ``(F_u - F_v)·Σ F_w ≤ ‖F_u - F_v‖·Σ_g max ‖F_w‖``, and the maxima of sparse rows.

The optimal value is preserved, and so is the first optimum in lexicographic order: a later option of a group replaces
an earlier one only when it is strictly better.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.problem import Problem

EXACT_OPTIONS = 20_000
"""Maximum number of options for which the exact bound, with maxima over each other group, is computed."""

EXACT_WORK = 20_000_000
"""Maximum number of entries for one exact bound (a few tenths of a second); beyond it Cauchy-Schwarz is used."""

COMPARISONS = 50_000_000
"""Maximum number of pairs of options of one group to compare (a few seconds)."""

COLUMNS = 8
"""Maximum number of columns of the factor along which trial choices are made."""

CHUNK = 2_000_000
"""Maximum number of entries of the intermediate tables."""

TIE = 4e-12
"""Margin for an option to count as strictly better, relative to the size of the objective's terms."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


def drop_dominated(
    problem: Problem,
    keep: Flags,
    stand_in: Integers,
    budgets: list[str],
    expired: Callable[[], bool] = lambda: False,
) -> None:
    """Remove dominated options from ``keep`` ``(V,)`` and record their replacements in ``stand_in`` ``(V,)``, in place.

    Args:
        problem: the problem with costs, uses and pair terms.
        keep: flags of the options still available; no choice takes any other option.
        stand_in: for each removed option, another option of its group; follow these until a kept option is reached.
        budgets: names of the budgeted resources.
        expired: function that returns whether to stop with the options removed so far.
    """
    uses, cost = [problem.resources[name] for name in budgets], problem.cost
    tie = TIE * float(np.maximum.reduceat(np.abs(cost), problem.group_offsets[:-1]).sum())
    pairs = _PairBound(problem, keep.copy()) if problem.pairs else None
    for first, second in _neighbours(problem, keep):
        if expired():
            return
        for better, worse, strictly in ((first, second, False), (second, first, True)):
            candidates = keep[better] & keep[worse]
            for use in uses:
                candidates &= use[better] <= use[worse]
            better, worse = better[candidates], worse[candidates]
            gain = cost[worse] - cost[better]
            if pairs is not None:
                proven = pairs.proves(better, worse, gain, tie if strictly else None)
            else:
                proven = gain > tie if strictly else gain >= 0.0
            keep[worse[proven]] = False
            stand_in[worse[proven]] = better[proven]


def _neighbours(problem: Problem, keep: Flags) -> Iterator[tuple[Integers, Integers]]:
    """Yield all pairs ``(first, second)`` of kept options of a group: adjacent ones, then two positions apart, ..."""
    end = problem.group_offsets[1:][problem.group_of]
    first, work = np.flatnonzero(keep), 0
    for shift in range(1, int(np.diff(problem.group_offsets).max())):
        first = first[first + shift < end[first]]
        first = first[keep[first]]
        work += len(first)
        if not len(first) or work > COMPARISONS:
            return
        yield first, first + shift


class _PairBound:
    """Upper bound on the excess of one option's pair terms over those of another of its group, over all choices."""

    def __init__(self, problem: Problem, keep: Flags) -> None:
        self.problem, self.keep = problem, keep
        self.factor = problem.pairs.factor if problem.pairs.rank else None
        half = problem.pairs.sparse if problem.pairs.num_sparse else None
        self.sparse = None if half is None else scipy.sparse.csr_array(half + half.T)

    def proves(self, better: Integers, worse: Integers, gain: Floats, tie: float | None) -> Flags:
        """Whether the pair terms of ``better`` ``(P,)`` always exceed those of ``worse`` by at most ``gain``.

        With ``tie``, the excess must be smaller than ``gain`` by more than ``tie`` plus the rounding of pair terms.
        """
        proven = np.zeros(len(better), dtype=bool)
        candidates, bound = np.arange(len(better)), self._loosely
        if self.problem.num_options <= EXACT_OPTIONS and len(better):
            for fields in (self.fields[:2], self.fields[2:]):
                differences = fields[:, better[candidates]] - fields[:, worse[candidates]]
                candidates = candidates[(differences <= gain[candidates] + TIE * self.size).all(axis=0)]
            if len(candidates) * self.problem.num_options <= EXACT_WORK:
                bound = self._exactly
        if bound == self._loosely and self.sparse is None:
            candidates = candidates[gain[candidates] >= 0.0]  # the Cauchy-Schwarz bound is never negative
        if len(candidates):
            margin = 0.0 if tie is None else tie + TIE * self.size
            excess = bound(better[candidates], worse[candidates]) - gain[candidates]
            proven[candidates] = excess <= 0.0 if tie is None else excess < -margin
        return proven

    @cached_property
    def size(self) -> float:
        """Upper bound on the absolute value of a choice's pair terms."""
        sparse = 0.0 if self.sparse is None else float(np.abs(self.sparse.data).sum())
        return sparse + (0.0 if self.factor is None else 0.5 * float(self.longest.sum()) ** 2)

    @cached_property
    def longest(self) -> Floats:
        """Largest norm of a factor row in every group, ``(G,)``."""
        assert self.factor is not None  # noqa: S101
        norms = np.sqrt(np.einsum("vr,vr->v", self.factor, self.factor))
        return np.asarray(np.maximum.reduceat(np.where(self.keep, norms, 0.0), self.problem.group_offsets[:-1]))

    @cached_property
    def fields(self) -> Floats:
        """Pair terms of every option with T trial choices of all other groups, ``(T, V)``.

        The choices are the cheapest options, the dearest ones, and the extremes along columns of the factor.
        """
        starts, group_of, cost = self.problem.group_offsets[:-1], self.problem.group_of, self.problem.cost
        columns = [] if self.factor is None else list(self.factor.T[:COLUMNS])
        values = [signed for value in (cost, *columns) for signed in (value, -value)]
        fields = np.zeros((len(values), len(cost)))
        for field, value in zip(fields, values, strict=True):
            order = np.lexsort((np.where(self.keep, value, np.inf), group_of))
            chosen = order[starts]
            if self.factor is not None:
                rows = self.factor[chosen]
                field += self.factor @ rows.sum(axis=0) - np.einsum("vr,vr->v", self.factor, rows[group_of])
            if self.sparse is not None:
                x = np.zeros(len(cost))
                x[chosen] = 1.0
                field += self.sparse @ x
        return fields

    @cached_property
    def kept(self) -> Integers:
        """Flat indices of the kept options."""
        return np.flatnonzero(self.keep)

    @cached_property
    def gram(self) -> Floats | None:
        """Factor terms of every option with the K kept ones, ``(V, K)``; None if they would take too much memory."""
        if self.factor is None or len(self.factor) * len(self.kept) > EXACT_WORK:
            return None
        return np.asarray(self.factor @ self.factor[self.kept].T)

    @cached_property
    def kept_starts(self) -> Integers:
        """Position of every group's first option among the kept ones, ``(G,)``."""
        groups, starts = np.unique(self.problem.group_of[self.kept], return_index=True)
        assert len(groups) == self.problem.num_groups  # noqa: S101
        return starts

    def _exactly(self, better: Integers, worse: Integers) -> Floats:
        """Sum, over the other groups, the largest difference in pair terms."""
        kept, starts = self.kept, self.kept_starts
        bound = np.empty(len(better))
        step = max(1, CHUNK // len(kept))
        for begin in range(0, len(better), step):
            b, w = better[begin : begin + step], worse[begin : begin + step]
            table = np.zeros((len(b), len(kept)))
            if self.gram is not None:
                table += self.gram[b] - self.gram[w]
            elif self.factor is not None:
                table += (self.factor[b] - self.factor[w]) @ self.factor[kept].T
            if self.sparse is not None:
                table += (self.sparse[b] - self.sparse[w])[:, kept].toarray()
            largest = np.maximum.reduceat(table, starts, axis=1)
            largest[np.arange(len(b)), self.problem.group_of[b]] = 0.0
            bound[begin : begin + step] = largest.sum(axis=1)
        return bound

    def _loosely(self, better: Integers, worse: Integers) -> Floats:
        """Bound the factor part by Cauchy-Schwarz and the sparse part by the maxima of its rows."""
        bound = np.zeros(len(better))
        if self.factor is not None:
            reach = self.longest.sum() - self.longest[self.problem.group_of[better]]
            step = max(1, CHUNK // self.factor.shape[1])
            for begin in range(0, len(better), step):
                block = slice(begin, begin + step)
                bound[block] = np.linalg.norm(self.factor[better[block]] - self.factor[worse[block]], axis=1)
            bound *= reach
        if self.sparse is not None:
            bound += self._sparse_maxima(better, worse)
        return bound

    def _sparse_maxima(self, better: Integers, worse: Integers) -> Floats:
        """For each pair of options, sum the largest difference of their sparse rows over the other groups."""
        rows = self.sparse[better] - self.sparse[worse]  # type: ignore[index]
        rows.sort_indices()
        if not rows.nnz:
            return np.zeros(len(better))
        row = np.repeat(np.arange(len(better)), np.diff(rows.indptr))
        group = self.problem.group_of[rows.indices]
        begins = np.flatnonzero(np.diff(row, prepend=-1).astype(bool) | np.diff(group, prepend=-1).astype(bool))
        largest = np.maximum.reduceat(rows.data, begins)
        full = np.diff(begins, append=rows.nnz) == np.diff(self.problem.group_offsets)[group[begins]]
        largest = np.where(full, largest, np.maximum(largest, 0.0))  # options without an entry differ by 0
        return np.bincount(row[begins], weights=largest, minlength=len(better)).astype(np.float64, copy=False)
