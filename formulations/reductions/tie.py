"""Tie groups that must take the same option, by joining them into one group of a smaller problem.

Layers that share a scale, are fused at run time or meet in a residual addition must be compressed alike. A choice of
the smaller problem and its `Tied.lift` have the same objective and uses. Pair terms between tied groups become part of
the costs or uses, because their options are always chosen together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.reductions.base import Choice, Reduction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tied(Reduction):
    """A problem with tied groups joined.

    Attributes:
        original: the original problem, with separate groups.
        problem: the smaller problem; a joined group is named ``"a + b"`` and has the option names of its first member.
        group: ``(G,)`` group of the smaller problem for every original group.
        option: ``(V,)`` flat option of the smaller problem for every original option.
        binding: whether choices in which tied groups differ are forbidden.
    """

    original: Problem
    problem: Problem
    group: NDArray[np.int64]
    option: NDArray[np.int64]
    binding: bool = False

    @property
    def complete(self) -> bool:
        """Whether the ties are binding; otherwise a choice in which tied groups differ may be better."""
        return self.binding

    def lift(self, choice: ArrayLike) -> Choice:
        """Map a choice of the smaller problem to a choice ``(G,)`` of the original."""
        local: Choice = (self.problem.flat(choice) - self.problem.group_offsets[:-1])[self.group]
        return local

    def lower(self, choice: ArrayLike) -> Choice | None:
        """Map a choice of the original to the smaller problem; None when tied groups differ in it."""
        local = self.original.flat(choice) - self.original.group_offsets[:-1]
        joined = local[np.unique(self.group, return_index=True)[1]]
        return joined if np.array_equal(joined[self.group], local) else None

    def lift_bound(self, bound: float) -> float:
        """Return the same bound if the ties are binding, else ``-inf``."""
        return bound if self.binding else -np.inf

    def combined(self, values: ArrayLike, function: np.ufunc) -> NDArray[np.float64]:
        """Combine numbers ``(V,)`` of the original's options by ``np.add`` or ``np.maximum``."""
        numbers = np.asarray(values, dtype=np.float64)
        start = 0.0 if function is np.add else -np.inf
        result = np.full(self.problem.num_options, start)
        function.at(result, self.option, numbers)
        return result


def tie(problem: Problem, tied: Sequence[Sequence[str]], *, binding: bool = False) -> Tied:
    """Join each set of groups into one group that decides for all of them.

    Args:
        problem: any problem.
        tied: disjoint sets of group names; the groups of a set have equally many options, which correspond in order.
        binding: whether choices in which tied groups differ are forbidden.

    Raises:
        InvalidProblemError: a group is unknown or occurs in two sets, or tied groups differ in their number of options.

    >>> problem = Problem(["a", "b", "c"], [["4 bits", "8 bits"]] * 3, [3, 1, 2, 0, 5, 4], {"bytes": [1, 2] * 3}, {})
    >>> both = tie(problem, [("a", "c")])
    >>> both.problem.groups, both.problem.cost.tolist(), both.lift([1, 0]).tolist()
    (('a + c', 'b'), [8.0, 5.0, 2.0, 0.0], [1, 0, 1])
    """
    group = _joined(problem, tied)
    first_member = np.unique(group, return_index=True)[1]
    sizes = np.diff(problem.group_offsets)
    offsets = np.concatenate([[0], np.cumsum(sizes[first_member])])
    local = np.arange(problem.num_options) - problem.group_offsets[problem.group_of]
    option = offsets[group[problem.group_of]] + local
    count = int(offsets[-1])

    def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(option, weights=values, minlength=count).astype(np.float64)

    cost = summed(problem.cost)
    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    if factor is not None:
        alone, factor = _joined_rows(factor, option, count)
        cost += alone
    of_option = np.repeat(np.arange(len(first_member)), np.diff(offsets))
    if sparse is not None:
        alone, sparse = _joined_terms(sparse, option, of_option)
        cost += alone
    resources, resource_pairs = {name: summed(use) for name, use in problem.resources.items()}, {}
    for name, terms in problem.resource_pairs.items():
        alone, resource_pairs[name] = _joined_terms(terms, option, of_option)
        resources[name] += alone
    members = [np.flatnonzero(group == g) for g in range(len(first_member))]
    smaller = Problem(
        [" + ".join(problem.groups[g] for g in numbers) for numbers in members],
        [problem.options[numbers[0]] for numbers in members],
        cost,
        resources,
        problem.budgets,
        PairTerms(sparse=sparse, factor=factor),
        problem.offset,
        problem.fixed,
        resource_pairs,
    )
    return Tied(original=problem, problem=smaller, group=group, option=option, binding=binding)


def _joined_rows(
    factor: NDArray[np.float64], option: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Add up the rows of tied options: the products within each joined option ``(count,)``, and the rows of all."""
    alone, joined = np.zeros(count), np.zeros((count, factor.shape[1]))
    left = np.arange(len(option))
    while len(left):  # the next row of every joined option, so that only sums and products are formed
        joint, first = np.unique(option[left], return_index=True)
        rows = factor[left[first]]
        alone[joint] += np.einsum("vr,vr->v", joined[joint], rows)
        joined[joint] += rows
        left = np.delete(left, first)
    return alone, joined


def _joined_terms(
    terms: Any, option: NDArray[np.int64], of_option: NDArray[np.int64]
) -> tuple[NDArray[np.float64], Any]:
    """Map pair terms to the joined options: those between tied options ``(V',)``, and the matrix of the others."""
    entries, count = terms.tocoo(), len(of_option)
    u, v = (option[coordinate] for coordinate in entries.coords)
    alone = np.bincount(u[u == v], weights=entries.data[u == v], minlength=count).astype(np.float64)
    apart = of_option[u] != of_option[v]
    places = np.minimum(u, v)[apart], np.maximum(u, v)[apart]
    return alone, scipy.sparse.csr_array((entries.data[apart], places), shape=(count, count))


def _joined(problem: Problem, tied: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """Return the index ``(G,)`` of every group's joined group, in the order of their first members."""
    place = {name: g for g, name in enumerate(problem.groups)}
    leader = np.arange(problem.num_groups)
    seen: set[str] = set()
    for names in tied:
        if isinstance(names, str):
            raise InvalidProblemError(f"tied groups must be sets of names, as [('a', 'b')], found the string {names!r}")
        for name in names:
            if name not in place:
                raise InvalidProblemError(f"cannot tie {name!r}: the problem has no group of this name")
            if name in seen:
                raise InvalidProblemError(
                    f"group {name!r} is in two sets; put all groups that belong together into one set"
                )
            seen.add(name)
            if len(problem.options[place[name]]) != len(problem.options[place[names[0]]]):
                raise InvalidProblemError(
                    f"tied groups must have equally many options: {names[0]!r} has "
                    f"{len(problem.options[place[names[0]]])}, {name!r} has {len(problem.options[place[name]])}"
                )
        leader[[place[name] for name in names]] = min((place[name] for name in names), default=0)
    return np.unique(leader, return_inverse=True)[1].astype(np.int64)
