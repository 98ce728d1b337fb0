"""Split a problem into independent components, whose groups no pair term and no budget connects.

`split` returns one `Component` for each. Optimal choices of all components together are an optimal choice of the whole
problem. Its objective is its offset plus the objectives of the components.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
from numpy.typing import ArrayLike, NDArray

from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.reductions.base import Choice, Reduction
from formulations.reductions.restriction import part

MAX_PARTS = 16
"""Maximum number of components; the smallest ones are merged into one."""

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Component(Reduction):
    """Some groups of a problem, with the other groups set to their options in ``rest``.

    Attributes:
        original: the whole problem.
        problem: the problem of these groups alone; its offset is 0.
        groups: ``(G',)`` indices of these groups in the original.
        rest: ``(G,)`` a choice of the original, used for the other groups.
        rest_bound: proven lower bound on the offset plus the cost of the other groups; ``-inf`` if none is known.
    """

    original: Problem
    problem: Problem
    groups: Integers
    rest: Choice
    rest_bound: float

    @property
    def complete(self) -> bool:
        """False, because the other groups may have a better choice than ``rest``."""
        return False

    def lift(self, choice: ArrayLike) -> Choice:
        """Return ``rest`` with the choice of these groups inserted."""
        lifted = self.rest.copy()
        lifted[self.groups] = choice
        return lifted

    def lower(self, choice: ArrayLike) -> Choice:
        """Return the original's choice in these groups."""
        return np.asarray(choice, dtype=np.int64)[self.groups]

    def lift_bound(self, bound: float) -> float:
        """Return the bound plus ``rest_bound``."""
        return bound + self.rest_bound

    def beside(self, rest: ArrayLike, rest_bound: float) -> "Component":
        """Return the same component with another choice of the other groups and a bound on their cost."""
        return replace(self, rest=np.array(rest, dtype=np.int64), rest_bound=rest_bound)


def split(problem: Problem) -> tuple[Component, ...]:
    """Split a problem into its components, smallest first; a single one when all groups are connected.

    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 5, 2], {"bytes": [2, 1, 3, 3]}, {"bytes": 5})
    >>> [(component.problem.groups, dict(component.problem.fixed)) for component in split(problem)]
    [(('a',), {'bytes': 3.0}), (('b',), {})]
    """
    problem.require_linear_budgets("split")
    of_group = _components(problem)
    rest = np.zeros(problem.num_groups, dtype=np.int64)
    return tuple(
        Component(
            original=problem,
            problem=piece,
            groups=groups,
            rest=rest,
            rest_bound=problem.offset if len(groups) == problem.num_groups else -np.inf,
        )
        for piece, groups in _pieces(problem, of_group)
    )


def _components(problem: Problem) -> Integers:
    """Return the component index ``(G,)`` of every group, smallest component first."""
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
    """Yield the problem and the groups of each component."""
    starts = problem.group_offsets[:-1]
    owner = {name: of_group[_varies(problem, name).argmax()] for name in problem.budgets}
    for component in range(int(of_group.max()) + 1):
        inside = of_group == component
        options = np.flatnonzero(inside[problem.group_of])
        budgets = {name: budget for name, budget in problem.budgets.items() if owner[name] == component}
        piece = part(problem, options, budgets, starts[~inside])  # the uses of the other groups are constant
        factor, sparse = piece.pairs.factor, piece.pairs.sparse
        factor = None if factor is None or not factor.any() else factor
        sparse = None if sparse is None or not sparse.nnz else sparse
        pairs = PairTerms.trusted(sparse=sparse, factor=factor)
        yield piece.derived(pairs=pairs, offset=0.0), np.flatnonzero(inside)


def _varies(problem: Problem, name: str) -> Flags:
    """Return whether the options of each group differ in their use, ``(G,)``."""
    use, starts = problem.resources[name], problem.group_offsets[:-1]
    return np.asarray(np.maximum.reduceat(use, starts) > np.minimum.reduceat(use, starts))
