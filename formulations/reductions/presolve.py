"""What need not be searched: options, groups and budgets taken out of a problem before it is solved, and the way back.

`reduce_problem` repeats, until nothing changes:

* an option goes when its use, with the least of all other groups, breaks a budget;
* a budget goes when no choice of what is left can break it;
* a dominated option goes (`formulations.reductions.dominance`).

Groups with one option left are folded in, budgets of whole uses are lowered to what uses can add up to, and groups
that neither a pair term nor a budget joins become problems of their own. What always holds: the best choices of the
parts, lifted, are a best choice of the original, and if a part has none the original has none; an objective of the
original is ``constant`` plus those of the parts, up to the rounding of a sum.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import ArrayLike, NDArray

from formulations.pairs import PairTerms
from formulations.problem import BUDGET_TOLERANCE, Problem
from formulations.reductions.dominance import Flags, Integers, drop_dominated
from formulations.reductions.restriction import Restriction, left_of, part, restrict

MAX_PARTS = 16
"""The most parts a problem is split into; the smallest components are left together in one."""

GRAIN = 2.0**-10
"""Uses that are multiples of this are added without rounding (up to `WHOLE` of them)."""

WHOLE = 2.0**53

LARGE_FACTOR, COPY_PAYS = 20_000_000, 0.05
"""A factor of so many numbers is copied only when at least this share of the options goes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduction:
    """A problem's independent parts, and how their choices make one of the whole.

    Attributes:
        original: the problem that was reduced.
        feasible: False when no choice meets the budgets; True says nothing.
        parts: what is left to decide, small ones first; none when all is decided. Their offsets are 0.
        constant: what the decided groups and the offset add to the objective.
        decided: ``(G,)`` flat options of the original: those of decided groups, and any one for the others.
        stand_in: ``(V,)`` flat options of the original: one that is kept and never worse, for each that went.
        budgets_dropped: names of budgets that no choice of what is left can break.
        budgets_lowered: names of budgets that were lowered to what uses can add up to.
    """

    original: Problem
    feasible: bool
    parts: tuple[Restriction, ...]
    constant: float
    decided: NDArray[np.int64]
    stand_in: NDArray[np.int64]
    budgets_dropped: tuple[str, ...]
    budgets_lowered: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether anything was reduced; if not, the one part is the original itself."""
        return not (len(self.parts) == 1 and self.parts[0].problem is self.original)

    def lift(self, choices: Sequence[ArrayLike]) -> NDArray[np.int64]:
        """The original's choice ``(G,)`` for one choice of every part."""
        chosen = self.decided.copy()
        for piece, choice in zip(self.parts, choices, strict=True):
            flat = piece.options[piece.problem.flat(choice)]
            chosen[self.original.group_of[flat]] = flat
        return chosen - self.original.group_offsets[:-1]

    def lower(self, choice: ArrayLike) -> list[NDArray[np.int64]]:
        """A choice for every part from one of the original; options that went are replaced by those that stand in.

        Of a choice within the budgets the result, lifted, is within them too and no worse.
        """
        chosen = self.stand_in[self.original.flat(choice)]
        return [
            np.searchsorted(
                piece.options, chosen[self.original.group_of[piece.options[piece.problem.group_offsets[:-1]]]]
            )
            - piece.problem.group_offsets[:-1]
            for piece in self.parts
        ]

    def summary(self) -> dict[str, Any]:
        """What was reduced, JSON-able: the numbers before and after, the names of budgets."""
        left = [piece.problem for piece in self.parts]
        return {
            "groups": [self.original.num_groups, sum(one.num_groups for one in left)],
            "options": [self.original.num_options, sum(one.num_options for one in left)],
            "budgets_dropped": list(self.budgets_dropped),
            "budgets_lowered": list(self.budgets_lowered),
            "parts": len(left),
        }


def reduce_problem(problem: Problem) -> Reduction:
    """What of ``problem`` must be searched.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 20})
    >>> reduction = reduce_problem(problem)
    >>> reduction.summary()["options"], reduction.lift([]).tolist()
    ([4, 0], [0, 0])
    """
    keep, stand_in = np.ones(problem.num_options, dtype=bool), np.arange(problem.num_options)
    budgets, dropped = list(problem.budgets), list[str]()
    while True:
        before = int(keep.sum())
        if not _drop_never_feasible(problem, keep, budgets):
            return _reduction(problem, np.ones_like(keep), stand_in, (), feasible=False)
        loose = [name for name in budgets if _never_binds(problem, keep, name)]
        budgets, dropped = [name for name in budgets if name not in loose], dropped + loose
        drop_dominated(problem, keep, stand_in, budgets)
        if keep.sum() == before and not loose:
            break
    if problem.pairs.rank * problem.num_options > LARGE_FACTOR and keep.mean() > 1.0 - COPY_PAYS:
        keep[:] = True
        dropped = [name for name in problem.budgets if _never_binds(problem, keep, name)]
        budgets = [name for name in problem.budgets if name not in dropped]
    small = problem
    if dropped:
        small = problem._replaced(budgets=MappingProxyType({name: problem.budgets[name] for name in budgets}))
    left = np.bincount(problem.group_of[keep])
    if left.min() > 1 and keep.all():
        base = Restriction(
            problem=small, options=np.arange(len(keep)), decided=problem.group_offsets[:-1], original=problem
        )
    else:
        base = restrict(small, keep)
    if left.max() == 1:
        constant = base.problem.offset + base.problem.cost[0]
        return _reduction(problem, keep, stand_in, (), constant=constant, dropped=dropped)
    lowered = {name: budget for name in budgets if (budget := _lowered(base.problem, name)) is not None}
    of_group = _components(base.problem)
    if base.problem is problem and not lowered and not of_group.any():
        return _reduction(problem, keep, stand_in, (base,))
    constant, merged = base.problem.offset, MappingProxyType({**base.problem.budgets, **lowered})
    stated = base.problem._replaced(budgets=merged, offset=0.0)
    parts = tuple(
        Restriction(problem=piece, options=base.options[options], decided=base.decided, original=problem)
        for piece, options in _pieces(stated, of_group)
    )
    return _reduction(problem, keep, stand_in, parts, constant=constant, dropped=dropped, lowered=lowered)


def _reduction(
    problem: Problem,
    keep: Flags,
    stand_in: Integers,
    parts: tuple[Restriction, ...],
    *,
    feasible: bool = True,
    constant: float = 0.0,
    dropped: Sequence[str] = (),
    lowered: Iterable[str] = (),
) -> Reduction:
    kept = np.flatnonzero(keep)
    left = np.bincount(problem.group_of[kept], minlength=problem.num_groups)
    decided = kept[np.cumsum(left) - left]
    while not np.array_equal(further := stand_in[stand_in], stand_in):
        stand_in = further
    return Reduction(
        original=problem,
        feasible=feasible,
        parts=parts,
        constant=float(constant),
        decided=decided,
        stand_in=np.where(keep[stand_in], stand_in, decided[problem.group_of]),
        budgets_dropped=tuple(dropped),
        budgets_lowered=tuple(lowered),
    )


def _drop_never_feasible(problem: Problem, keep: Flags, budgets: list[str]) -> bool:
    """Drop options that break a budget even with the least use of all other groups; False when a group has no other."""
    starts, group_of = problem.group_offsets[:-1], problem.group_of
    while True:
        before = int(keep.sum())
        for name in budgets:
            use, budget = problem.resources[name], problem.budgets[name]
            least = np.minimum.reduceat(np.where(keep, use, np.inf), starts)
            room = budget + 2 * BUDGET_TOLERANCE * abs(budget) - least.sum()
            if not room >= 0:  # minus infinity where a group has no option left
                return False
            keep &= use - least[group_of] <= room
        if keep.sum() == before:
            return True


def _never_binds(problem: Problem, keep: Flags, name: str) -> bool:
    """Whether even the largest uses keep within a budget."""
    budget = problem.budgets[name]
    most = np.maximum.reduceat(np.where(keep, problem.resources[name], 0.0), problem.group_offsets[:-1]).sum()
    return bool(most <= budget + 0.5 * BUDGET_TOLERANCE * abs(budget))


def _lowered(problem: Problem, name: str) -> float | None:
    """What uses with a common unit can add up to within a budget, where that is less than the budget."""
    use, budget, starts = problem.resources[name], problem.budgets[name], problem.group_offsets[:-1]
    least = np.minimum.reduceat(use, starts)
    if np.maximum.reduceat(use, starts).sum() >= WHOLE * GRAIN or (use % GRAIN).any():
        return None
    unit = GRAIN * int(np.gcd.reduce(((use - least[problem.group_of]) / GRAIN).astype(np.int64)))
    lowered = least.sum() + np.floor((budget + BUDGET_TOLERANCE * abs(budget) - least.sum()) / unit) * unit
    too_fine = unit <= 4 * BUDGET_TOLERANCE * abs(budget)
    return None if lowered >= budget or too_fine else float(lowered)


def _components(problem: Problem) -> Integers:
    """``(G,)`` the number of every group's component, small ones first: groups with nothing in common differ."""
    groups, starts, sparse = problem.num_groups, problem.group_offsets[:-1], problem.pairs.sparse
    hubs = []
    for name in problem.budgets:
        hubs.append(_varies(problem, name))
        if hubs[-1].all():
            return np.zeros(groups, dtype=np.int64)
    if problem.pairs.factor is not None:
        hubs.append(np.logical_or.reduceat(problem.pairs.factor.any(axis=1), starts))
        if hubs[-1].all():
            return np.zeros(groups, dtype=np.int64)
    joined = [np.stack([np.flatnonzero(hub), np.full(hub.sum(), groups + i)]) for i, hub in enumerate(hubs)]
    if sparse is not None:
        rows = np.repeat(np.arange(problem.num_options), np.diff(sparse.indptr))
        joined.append(problem.group_of[np.stack([rows, sparse.indices])])
    nodes = groups + len(hubs)
    first, second = np.concatenate(joined, axis=1) if joined else np.zeros((2, 0), dtype=np.int64)
    graph = scipy.sparse.coo_array((np.ones(len(first), dtype=bool), (first, second)), shape=(nodes, nodes))
    of_group = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:groups]
    size = np.bincount(of_group, weights=np.diff(problem.group_offsets))
    size[size == 0] = np.inf  # a budget or a factor without groups
    rank = np.empty(len(size), dtype=np.int64)
    rank[np.argsort(size, kind="stable")] = np.arange(len(size))
    surplus = max(0, int(np.isfinite(size).sum()) - MAX_PARTS)
    return np.asarray(np.maximum(rank[of_group] - surplus, 0))


def _pieces(problem: Problem, of_group: Integers) -> Iterator[tuple[Problem, Integers]]:
    """Each component's problem and its options ``(V',)``."""
    starts = problem.group_offsets[:-1]
    owner = {name: of_group[_varies(problem, name).argmax()] for name in problem.budgets}
    for component in range(int(of_group.max()) + 1):
        inside = of_group == component
        options = np.flatnonzero(inside[problem.group_of])
        budgets = {name: budget for name, budget in problem.budgets.items() if owner[name] == component}
        if not inside.all():  # the others' uses do not vary
            budgets = {name: left_of(problem, name, problem.resources[name][starts[~inside]].sum()) for name in budgets}
        piece = part(problem, options, budgets)
        factor, sparse = piece.pairs.factor, piece.pairs.sparse
        factor = None if factor is None or not factor.any() else factor
        sparse = None if sparse is None or not sparse.nnz else sparse
        yield piece._replaced(pairs=PairTerms.trusted(sparse=sparse, factor=factor)), options


def _varies(problem: Problem, name: str) -> Flags:
    """``(G,)`` whether a group's options differ in their use."""
    use, starts = problem.resources[name], problem.group_offsets[:-1]
    return np.asarray(np.maximum.reduceat(use, starts) > np.minimum.reduceat(use, starts))
