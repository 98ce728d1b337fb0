"""State budgets with pair terms as linear budgets, by a group of products for each pair of groups with such terms.

Let R be the options of group g and C the options of group h that have a pair term with each other in a budget. The
options of g form a class {u} for each u in R and one class of all other options, and likewise for h and C. The new
group "g × h" has one option y_ij for each class i of g and j of h; its uses are the pair terms of the two classes.
Budgets of 1 ensure that the option of the new group matches the chosen options:

    Σ_j y_ij + Σ_{u in g, not in class i} x_u ≤ 1   for every class i of g, and likewise for every class of h.

Because exactly one y and one x of each group are 1, these rows are equivalent to ``Σ_j y_ij = Σ_{u in class i} x_u``,
the first-level reformulation-linearisation (Adams & Sherali, doi:10.1287/mnsc.32.10.1274). Unlike for other reductions,
``lower(lift(choice))`` equals ``choice`` only if the choice is feasible: an infeasible choice may have a wrong product.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.reductions.base import Choice, Reduction
from formulations.validation import frozen

MAX_NUMBERS = 4_000_000
"""Maximum number of uses in the linear problem: its options times its budgets (8 bytes each)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedGroups:
    """Two groups with pair terms in a budget.

    Attributes:
        first, second: the groups' indices.
        rows, columns: the class of each option of the first and of the second group.
        shape: numbers of classes of the two groups.
        paired: flat options of the first and of the second group that have a pair term, in the order of their classes.
    """

    first: int
    second: int
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    shape: tuple[int, int]
    paired: tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linearisation(Reduction):
    """A problem whose budgets have no pair terms; see the module's docstring.

    Attributes:
        original: the original problem.
        problem: the original's groups, followed by a group of products for each of `group_pairs`.
        group_pairs: the pairs of groups with pair terms in a budget.
    """

    original: Problem
    problem: Problem
    group_pairs: tuple[PairedGroups, ...] = field(repr=False)

    def lift(self, choice: ArrayLike) -> Choice:
        """Leave out the products."""
        return np.array(choice, dtype=np.int64)[: self.original.num_groups]

    def lower(self, choice: ArrayLike) -> Choice:
        """Add the products of the chosen options."""
        chosen = np.array(choice, dtype=np.int64)
        products = [
            pair.rows[chosen[pair.first]] * pair.shape[1] + pair.columns[chosen[pair.second]]
            for pair in self.group_pairs
        ]
        return np.concatenate([chosen, np.array(products, dtype=np.int64)])

    def lift_bound(self, bound: float) -> float:
        """Return the same bound."""
        return bound


def linearised(problem: Problem) -> Linearisation:
    """State the budgets with pair terms of a problem as linear ones; every feasible choice keeps its objective.

    Raises:
        EncodingError: the linear problem would have more than `MAX_NUMBERS` uses.

    >>> terms = scipy.sparse.csr_array(([6.0], ([0], [2])), shape=(4, 4))
    >>> problem = Problem(
    ...     ["a", "b"], [["wide", "narrow"]] * 2, [0, 2, 0, 3], {"macs": [0] * 4}, {"macs": 5}, None, 0.0, {},
    ...     {"macs": terms},
    ... )
    >>> linear = linearised(problem)
    >>> linear.problem.groups, linear.problem.options[2], linear.problem.resources["macs"].tolist()
    (('a', 'b', 'a × b'), ('wide, wide', 'wide, other', 'other, wide', 'other, other'), [0.0, 0.0, 0.0, 0.0, 6.0, 0.0, 0.0, 0.0])
    >>> linear.lower([1, 0]).tolist(), linear.problem.evaluate([1, 0, 2]).feasible
    ([1, 0, 2], True)
    """  # noqa: E501 - the doctest's line
    group_pairs = tuple(_group_pairs(problem))
    sizes = np.array([pair.shape[0] * pair.shape[1] for pair in group_pairs], dtype=np.int64)
    count = problem.num_options + int(sizes.sum())
    links = sum(classes for pair in group_pairs for classes in pair.shape if classes > 1)
    if (numbers := count * (links + len(problem.budgets))) > MAX_NUMBERS:
        raise EncodingError(
            f"linearising the pair terms of {', '.join(problem.paired_budgets)} takes {int(sizes.sum()):,} products of "
            f"options and {links:,} budgets, {numbers:,} numbers; the limit is {MAX_NUMBERS:,}"
        )
    offsets = np.concatenate([problem.group_offsets, problem.num_options + np.cumsum(sizes)]).astype(np.int64)
    budgeted = {name: _with_products(problem, name, group_pairs) for name in problem.budgets}
    rows = _links(problem, group_pairs, offsets[problem.num_groups : -1], count)
    names = _distinct((f"link {number}" for number in range(len(rows))), problem.resources)
    products = (f"{problem.groups[pair.first]} × {problem.groups[pair.second]}" for pair in group_pairs)
    factor, sparse = problem.pairs.factor, problem.pairs.sparse
    if factor is not None:
        factor = frozen(np.vstack([factor, np.zeros((count - len(factor), factor.shape[1]))]))
    if sparse is not None:
        sparse = scipy.sparse.csr_array(sparse, copy=True)
        sparse.resize((count, count))
    linear = problem.derived(
        groups=(*problem.groups, *_distinct(products, problem.groups)),
        options=(*problem.options, *(_labels(problem, pair) for pair in group_pairs)),
        cost=frozen(np.concatenate([problem.cost, np.zeros(count - problem.num_options)])),
        resources=MappingProxyType(budgeted | dict(zip(names, rows, strict=True))),
        budgets=MappingProxyType({**problem.budgets, **dict.fromkeys(names, 1.0)}),
        pairs=PairTerms.trusted(sparse=sparse, factor=factor),
        fixed=MappingProxyType({name: use for name, use in problem.fixed.items() if name in problem.budgets}),
        resource_pairs=MappingProxyType({}),
        group_offsets=frozen(offsets),
        group_of=frozen(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))),
    )
    return Linearisation(original=problem, problem=linear, group_pairs=group_pairs)


def _group_pairs(problem: Problem) -> Iterable[PairedGroups]:
    """Yield the pairs of groups that have pair terms in a budget."""
    if not problem.paired_budgets:
        return
    first = problem.group_offsets
    terms = [problem.resource_pairs[name].tocoo() for name in problem.paired_budgets]
    u, v = (np.concatenate([matrix.coords[side] for matrix in terms]).astype(np.int64) for side in (0, 1))
    key = problem.group_of[u] * problem.num_groups + problem.group_of[v]
    order = np.argsort(key, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        groups = [int(problem.group_of[side[members[0]]]) for side in (u, v)]
        paired = (np.unique(u[members]), np.unique(v[members]))
        classes = [
            np.full(len(problem.options[group]), len(options)) for group, options in zip(groups, paired, strict=True)
        ]
        for group, options, numbers in zip(groups, paired, classes, strict=True):
            numbers[options - first[group]] = np.arange(len(options))
        shape = (int(classes[0].max()) + 1, int(classes[1].max()) + 1)
        yield PairedGroups(
            first=groups[0], second=groups[1], rows=classes[0], columns=classes[1], shape=shape, paired=paired
        )


def _with_products(problem: Problem, name: str, group_pairs: Iterable[PairedGroups]) -> NDArray[np.float64]:
    """Return the uses of a resource by the options, followed by those by the products."""
    uses = [problem.resources[name]]
    for pair in group_pairs:
        together = np.zeros(pair.shape)
        if name in problem.resource_pairs:
            rows, columns = pair.paired
            together[: len(rows), : len(columns)] = problem.resource_pairs[name][rows][:, columns].toarray()
        uses.append(together.ravel())
    return frozen(np.concatenate(uses))


def _links(
    problem: Problem, group_pairs: Iterable[PairedGroups], starts: NDArray[np.int64], count: int
) -> list[NDArray[np.float64]]:
    """Return the uses ``(V',)`` of the budgets that tie the products to the chosen options."""
    links = []
    for pair, start in zip(group_pairs, starts.tolist(), strict=True):
        product = start + np.arange(pair.shape[0] * pair.shape[1]).reshape(pair.shape)
        for group, classes, lines in ((pair.first, pair.rows, product), (pair.second, pair.columns, product.T)):
            begin, end = problem.group_offsets[group : group + 2]
            for number, line in enumerate(lines if len(lines) > 1 else ()):
                link = np.zeros(count)
                link[begin:end] = classes != number
                link[line] = 1.0
                links.append(frozen(link))
    return links


def _labels(problem: Problem, pair: PairedGroups) -> tuple[str, ...]:
    sides = []
    for group, options, size in zip((pair.first, pair.second), pair.paired, pair.shape, strict=True):
        names = [problem.options[group][option - problem.group_offsets[group]] for option in options]
        sides.append([*names, *["other"] * (size - len(names))])
    return tuple(f"{u}, {v}" for u, v in itertools.product(*sides))


def _distinct(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Return the names, with a prime added to those that are taken."""
    known, distinct = set(taken), []
    for name in names:
        while name in known:
            name += "'"
        known.add(name)
        distinct.append(name)
    return distinct
