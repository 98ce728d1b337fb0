"""Families of random problems from the literature on solvers: knapsacks, cuts, QUBOs, signed pair terms.

Each instance is drawn by numpy's default generator from a seed, so the family, its arguments and this module define it
completely. Bits become groups with the two options "0" and "1". If the problem in the literature is a maximisation,
its value is negated.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import InvalidProblemError
from formulations.generators.random_instances import layered_problem
from formulations.pairs import PairTerms
from formulations.problem import Problem

Floats = NDArray[np.float64]


def multiple_choice_knapsack(groups: int, options: int, budgets: int, *, seed: int = 0) -> Problem:
    """Draw whole uses below 100 and values that grow with them; each budget is in the middle of its range.

    >>> problem = multiple_choice_knapsack(4, 3, 2)
    >>> problem.num_options, list(problem.budgets)
    (12, ['use0', 'use1'])
    """
    rng = np.random.default_rng(seed)
    use = rng.integers(0, 100, (groups * options, budgets)).astype(np.float64)
    value = use.mean(axis=1) * rng.uniform(0.5, 1.5, groups * options)
    return _stated(groups, options, -value, use, 0.5)


def signed_pairs(groups: int, options: int, degree: int, *, largest: int | None = None, seed: int = 0) -> Problem:
    """Draw sparse pair terms of both signs between random groups, with one budget.

    Args:
        groups: number of groups G.
        options: number of options in each group.
        degree: mean number of groups with which each group has pair terms.
        largest: draw costs and pair terms as whole numbers up to this; None draws them from a normal distribution.
        seed: seed of numpy's default generator.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Floats:
        if largest is None:
            return rng.normal(size=shape)
        return rng.integers(-largest, largest + 1, shape).astype(np.float64)

    partners = [
        rng.choice(np.arange(group + 1, groups), size=min(degree // 2, groups - 1 - group), replace=False)
        for group in range(groups - 1)
    ]
    blocks = [
        (group, int(partner), draw(options, options)) for group in range(groups - 1) for partner in partners[group]
    ]
    use = rng.integers(1, 99, (groups * options, 1)).astype(np.float64)
    return _stated(groups, options, draw(groups * options), use, 0.35, _blocks(groups, options, blocks))


def dense_pairs(groups: int, options: int, *, seed: int = 0) -> Problem:
    """Draw normally distributed pair terms between all options of different groups, with no costs and one budget."""
    rng = np.random.default_rng(seed)
    size, group_of = groups * options, np.repeat(np.arange(groups), options)
    terms = np.triu(rng.normal(size=(size, size)), 1) * (group_of[:, None] != group_of[None, :])
    use = rng.integers(1, 99, (size, 1)).astype(np.float64)
    return _stated(groups, options, np.zeros(size), use, 0.35, PairTerms(sparse=scipy.sparse.csr_array(terms)))


def chain(groups: int, options: int, *, seed: int = 0) -> Problem:
    """Draw normally distributed pair terms between each group and the next, with one budget."""
    rng = np.random.default_rng(seed)
    blocks = [(group, group + 1, rng.normal(size=(options, options))) for group in range(groups - 1)]
    use = rng.integers(1, 99, (groups * options, 1)).astype(np.float64)
    cost = rng.normal(size=groups * options)
    return _stated(groups, options, cost, use, 0.35, _blocks(groups, options, blocks))


def layers(num_groups: int, *, more_budgets: int = 0, limited: bool = True, seed: int = 0, **arguments: Any) -> Problem:
    """Draw a `layered_problem`, with further budgets in the middle of their ranges, or with no budget at all.

    >>> list(layers(3, more_budgets=1).budgets), list(layers(3, limited=False).budgets)
    (['bytes', 'more0'], [])
    """
    problem = layered_problem(num_groups, seed=seed, **arguments)
    if not limited:
        return problem.derived(resources={}, budgets={})
    rng, starts = np.random.default_rng(seed), problem.group_offsets[:-1]
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    for number in range(more_budgets):
        size = np.exp(rng.normal(9.0, 1.2, problem.num_groups))
        use = size[problem.group_of] * rng.uniform(2, 8, problem.num_options)
        low, high = np.minimum.reduceat(use, starts).sum(), np.maximum.reduceat(use, starts).sum()
        resources[f"more{number}"], budgets[f"more{number}"] = use, float((low + high) / 2)
    return problem.derived(resources=resources, budgets=budgets)


def factor_and_pairs(num_groups: int, *, degree: int = 4, seed: int = 0) -> Problem:
    """Draw a `layered_problem` with a factor, and add half of the sparse pair terms of another one."""
    factor = layered_problem(num_groups, seed=seed)
    sparse = layered_problem(num_groups, degree=degree, seed=seed).pairs.sparse
    return factor.derived(pairs=PairTerms(factor=factor.pairs.factor, sparse=0.5 * sparse))


def random_max_cut(vertices: int, density: float, *, seed: int = 0) -> Problem:
    """Draw a maximum-cut problem on a graph in which each edge, of weight 1, occurs with probability ``density``.

    >>> random_max_cut(3, 1.0).evaluate([0, 1, 1]).objective
    -2.0
    """
    rng = np.random.default_rng(seed)
    there = np.triu(rng.random((vertices, vertices)) < density, 1)
    return _max_cut(vertices, scipy.sparse.csr_array(there.astype(np.float64)))


def torus_max_cut(rows: int, columns: int, *, seed: int = 0) -> Problem:
    """Draw a maximum-cut problem on a toroidal grid with edges of weight 1 or -1, like the spin glasses of the Gset."""
    rng = np.random.default_rng(seed)
    vertex = np.arange(rows * columns).reshape(rows, columns)
    ends = np.concatenate([np.roll(vertex, 1, axis).ravel() for axis in (0, 1)])
    begins = np.concatenate([vertex.ravel()] * 2)
    weight = rng.choice([-1.0, 1.0], len(ends))
    low, high = np.minimum(begins, ends), np.maximum(begins, ends)
    weights = scipy.sparse.csr_array((weight, (low, high)), shape=(rows * columns,) * 2)
    return _max_cut(rows * columns, weights)


def random_qubo(variables: int, density: float, *, seed: int = 0) -> Problem:
    """Draw a QUBO ``xᵀQx`` whose entries, whole numbers from -50 to 50, occur with probability ``density``."""
    rng = np.random.default_rng(seed)
    entries = rng.integers(-50, 51, (variables, variables)) * (rng.random((variables, variables)) < density)
    return _binary(np.diag(entries).astype(np.float64), scipy.sparse.csr_array(2.0 * np.triu(entries, 1)))


def quadratic_knapsack(items: int, density: float, *, seed: int = 0) -> Problem:
    """Draw profits from 1 to 100, weights from 1 to 50, and a capacity from 50 to half of the total weight.

    If half of the total weight is below 50, the capacity is 50. Billionnet and Soutif,
    doi:10.1016/S0377-2217(03)00244-3, draw their instances in this way.
    """
    rng = np.random.default_rng(seed)
    profit = np.triu(rng.integers(1, 101, (items, items)) * (rng.random((items, items)) < density))
    weight = rng.integers(1, 51, items).astype(np.float64)
    capacity = float(rng.integers(50, max(51, int(weight.sum()) // 2)))
    terms = scipy.sparse.csr_array(-np.triu(profit, 1).astype(np.float64))
    return _binary(-np.diag(profit).astype(np.float64), terms, weight, capacity)


FAMILIES: Mapping[str, Callable[..., Problem]] = MappingProxyType(
    {
        family.__name__: family
        for family in (
            multiple_choice_knapsack,
            signed_pairs,
            dense_pairs,
            chain,
            layers,
            factor_and_pairs,
            random_max_cut,
            torus_max_cut,
            random_qubo,
            quadratic_knapsack,
        )
    }
)
"""The families by name, as stored in the records of instances."""


def member(family: str, arguments: Mapping[str, Any]) -> Problem:
    """Generate the instance of a family with the given arguments.

    Raises:
        InvalidProblemError: the family is unknown, or does not take these arguments.

    >>> member("random_qubo", {"variables": 4, "density": 1.0, "seed": 1}).num_groups
    4
    """
    if family not in FAMILIES:
        raise InvalidProblemError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](**arguments)
    except TypeError as error:
        raise InvalidProblemError(f"family {family!r}: {error}") from error


def _stated(
    groups: int, options: int, cost: Floats, use: Floats, share: float, pairs: PairTerms | None = None
) -> Problem:
    """Build a problem whose budgets are at a fraction ``share`` of the range from the smallest to the largest use."""
    by_group = use.reshape(groups, options, -1)
    low, high = by_group.min(axis=1).sum(axis=0), by_group.max(axis=1).sum(axis=0)
    names = [f"use{k}" for k in range(use.shape[1])]
    return Problem(
        [f"g{g}" for g in range(groups)],
        [[str(o) for o in range(options)]] * groups,
        cost,
        dict(zip(names, use.T, strict=True)),
        dict(zip(names, np.floor(low + share * (high - low)).tolist(), strict=True)),
        pairs or PairTerms(),
    )


def _blocks(groups: int, options: int, blocks: list[tuple[int, int, Floats]]) -> PairTerms:
    """Build sparse pair terms from blocks ``(options, options)`` between pairs of groups."""
    size = groups * options
    inner = np.arange(options)
    rows = [np.repeat(group * options + inner, options) for group, _, _ in blocks]
    columns = [np.tile(partner * options + inner, options) for _, partner, _ in blocks]
    data = np.concatenate([block.ravel() for _, _, block in blocks] or [np.zeros(0)])
    where = tuple(np.concatenate(part or [np.zeros(0, dtype=np.int64)]) for part in (rows, columns))
    return PairTerms(sparse=scipy.sparse.csr_array((data, where), shape=(size, size)))


def _binary(
    linear: Floats, terms: scipy.sparse.csr_array, weight: Floats | None = None, capacity: float = 0.0
) -> Problem:
    """Build a problem of bits; ``terms`` is strictly upper triangular, ``weight`` is used by bits that are 1."""
    size = len(linear)
    cost = np.stack([np.zeros(size), linear], axis=1).ravel()
    upper = terms.tocoo()
    sparse = scipy.sparse.csr_array((upper.data, (2 * upper.row + 1, 2 * upper.col + 1)), shape=(2 * size, 2 * size))
    use = {} if weight is None else {"weight": np.stack([np.zeros(size), weight], axis=1).ravel()}
    names = [f"x{i}" for i in range(size)]
    return Problem(names, [["0", "1"]] * size, cost, use, dict.fromkeys(use, capacity), PairTerms(sparse=sparse))


def _max_cut(vertices: int, weights: scipy.sparse.csr_array) -> Problem:
    """Minimise ``-Σ w_ij·(x_i ≠ x_j)``, with ``w·(x_i ≠ x_j) = w·x_i + w·x_j - 2·w·x_i·x_j``."""
    degree = np.asarray(weights.sum(axis=0)).ravel() + np.asarray(weights.sum(axis=1)).ravel()
    return _binary(-degree[:vertices], 2.0 * weights)
