"""Restrict a problem to some of its options.

`restrict` leaves options out and folds in groups with one option left: their costs, their pair terms with other groups
and their uses become part of the costs, the offset and the fixed uses. A choice of the smaller problem and its `lift`
have the same objective and the same use of every budgeted resource, up to rounding errors of sums.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.products import sum_of_products
from formulations.reductions.base import Choice, Reduction
from formulations.validation import frozen

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Restriction(Reduction):
    """A problem restricted to some of its options.

    Attributes:
        original: the original problem.
        problem: the smaller problem (one group with one option when everything is decided).
        options: ``(V',)`` flat options of the original, in the smaller problem's order.
        decided: ``(G,)`` flat options of the original: the remaining option of each folded group, any for the others.
        outside: proven lower bound on all choices with an option that is left out; infinite if no such choice exists.
    """

    original: Problem
    problem: Problem
    options: NDArray[np.int64]
    decided: NDArray[np.int64]
    outside: float = -np.inf

    @property
    def keep(self) -> NDArray[np.bool_]:
        """Flags ``(V,)`` of the original's options that were kept."""
        keep = np.zeros(self.original.num_options, dtype=bool)
        keep[self.decided] = True
        keep[self.options] = True
        return keep

    @property
    def complete(self) -> bool:
        """Whether no choice with an option left out is better than the best known choice."""
        return bool(self.outside > -np.inf)

    def lift(self, choice: ArrayLike) -> Choice:
        """Map a choice of the smaller problem to a choice ``(G,)`` of the original."""
        chosen = self.decided.copy()
        flat = self.options[self.problem.flat(choice)]
        chosen[self.original.group_of[flat]] = flat
        return chosen - self.original.group_offsets[:-1]

    def lower(self, choice: ArrayLike) -> Choice | None:
        """Map a choice of the original to the smaller problem; None when it takes an option that was left out."""
        chosen = self.original.flat(choice)
        place = np.full(self.original.num_options, -1)
        place[self.options] = np.arange(len(self.options))
        groups = self.original.group_of[self.options[self.problem.group_offsets[:-1]]]
        rest = np.ones(len(chosen), dtype=bool)
        rest[groups] = False
        if (place[chosen[groups]] < 0).any() or (chosen[rest] != self.decided[rest]).any():
            return None
        return place[chosen[groups]] - self.problem.group_offsets[:-1]

    def lift_bound(self, bound: float) -> float:
        """Return the smaller of the bound and `outside`."""
        return min(bound, self.outside)


def restrict(problem: Problem, keep: NDArray[np.bool_], *, outside: float = -np.inf) -> Restriction:
    """Restrict a problem to the options marked in ``keep``; groups with one option left are folded in.

    Args:
        problem: any problem.
        keep: ``(V,)`` flags of the options to keep.
        outside: proven lower bound on all choices with an option that is left out, for example the objective of a known
            choice that none of them improves; infinite when no such choice is feasible.

    Raises:
        InvalidProblemError: a group is left without an option.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> small = restrict(problem, np.array([True, False, True, True]))
    >>> small.problem.groups, small.lift([1]).tolist()
    (('b',), [0, 1])
    """
    kept = np.flatnonzero(keep)
    num_kept = np.bincount(problem.group_of[kept], minlength=problem.num_groups)
    if (num_kept == 0).any():
        raise InvalidProblemError(f"group {problem.groups[int(np.argmin(num_kept))]!r} is left without an option")
    decided = kept[np.cumsum(num_kept) - num_kept]
    folded = num_kept == 1
    if folded.all():
        folded[-1] = False  # a problem needs at least one group
    fixed = decided[folded]
    options = kept[~folded[problem.group_of[kept]]]

    x = np.zeros(problem.num_options)
    x[fixed] = 1.0
    cost, offset = problem.cost[options], problem.offset + problem.cost[fixed].sum()
    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    if factor is not None and len(fixed):
        rows = factor[fixed]
        offset += sum_of_products(rows)
        cost += (factor @ rows.sum(axis=0))[options]
    if sparse is not None and len(fixed):
        offset += x @ (sparse @ x)
        cost += (sparse @ x + sparse.T @ x)[options]
    smaller = part(problem, options, problem.budgets, fixed)
    smaller = smaller.derived(cost=frozen(cost), offset=float(offset))
    if problem.paired_budgets:
        smaller = smaller.derived(**_paired_uses(problem, smaller, options, x))
    return Restriction(original=problem, problem=smaller, options=options, decided=decided, outside=outside)


def _paired_uses(problem: Problem, smaller: Problem, options: Integers, x: NDArray[np.float64]) -> dict[str, Any]:
    """Compute the remaining uses: pair terms with the decided options ``x`` ``(V,)`` become uses and fixed uses."""
    resources, fixed, pairs = dict(smaller.resources), dict(smaller.fixed), {}
    for name in problem.paired_budgets:
        terms = problem.resource_pairs[name]
        resources[name] = frozen(resources[name] + (terms @ x + terms.T @ x)[options])
        fixed[name] = fixed.get(name, 0.0) + float(x @ (terms @ x))
        open_terms = terms[options][:, options]
        if open_terms.nnz:
            pairs[name] = open_terms
    return {
        "resources": MappingProxyType(resources),
        "fixed": MappingProxyType({name: use for name, use in fixed.items() if use}),
        "resource_pairs": MappingProxyType(pairs),
    }


def part(problem: Problem, options: Integers, budgets: Mapping[str, float], decided: Integers | None = None) -> Problem:
    """Make a separate problem of some of the options; groups without any are left out.

    The content was checked when ``problem`` was made and is not checked again (a million groups take a second).

    Args:
        problem: any problem.
        options: ``(V',)`` flat options, ascending.
        budgets: budgets of the part; resources without a budget are left out.
        decided: flat options of other groups, whose uses become fixed uses.
    """
    uses = {name: float(problem.resources[name][decided].sum()) for name in budgets} if decided is not None else {}
    fixed = {name: problem.fixed.get(name, 0.0) + uses.get(name, 0.0) for name in budgets}
    group_of = problem.group_of[options]
    groups, sizes = np.unique(group_of, return_counts=True)
    group_offsets = np.concatenate([[0], np.cumsum(sizes)])
    everything = len(options) == problem.num_options
    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    resources = {name: problem.resources[name] for name in budgets}
    if not everything:
        resources = {name: frozen(use[options]) for name, use in resources.items()}
        factor = None if factor is None else frozen(factor[options])
        sparse = None if sparse is None else sparse[options][:, options]
    return problem.derived(
        groups=problem.groups if everything else tuple(problem.groups[g] for g in groups.tolist()),
        options=problem.options if everything else tuple(_labels(problem, options, groups, group_offsets)),
        cost=problem.cost if everything else frozen(problem.cost[options]),
        resources=MappingProxyType(resources),
        budgets=MappingProxyType(dict(budgets)),
        fixed=MappingProxyType({name: use for name, use in fixed.items() if use}),
        pairs=PairTerms.trusted(sparse=sparse, factor=factor),
        resource_pairs=MappingProxyType({}),
        group_offsets=frozen(group_offsets.astype(np.int64)),
        group_of=frozen(np.repeat(np.arange(len(groups)), sizes)),
    )


def _labels(
    problem: Problem, options: NDArray[np.int64], groups: NDArray[np.int64], group_offsets: NDArray[np.int64]
) -> Iterable[tuple[str, ...]]:
    local = (options - problem.group_offsets[problem.group_of[options]]).tolist()
    for group, (begin, end) in zip(groups.tolist(), itertools.pairwise(group_offsets.tolist()), strict=True):
        labels = problem.options[group]
        yield labels if end - begin == len(labels) else tuple(labels[i] for i in local[begin:end])
