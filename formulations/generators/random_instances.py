"""Generate random problems with realistic structure, for tests and benchmarks.

Every group is a layer with a log-normal number of weights, and its options are bit-widths. Rounding to b bits changes
the weights by an amplitude that halves with every bit. The effect of an option on the output is therefore a vector
``F_v = a_g·2^(1-b)·(u_g + noise_v)`` with a direction ``u_g`` of its layer. The loss is quadratic in the sum of the
effects, hence pair terms ``F_u·F_v``. Half of the squared norm of an effect lies outside the r directions that the
layers share and interacts with no other layer, hence ``cost_v = ½·2‖F_v‖²`` (without it effects could cancel out).
"""

from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import scipy.sparse

from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.resource_pairs import checked_resource_pairs

BITS = (2, 3, 4, 5, 6, 8)


def layered_problem(
    num_groups: int,
    *,
    bits: Sequence[int] = BITS,
    rank: int = 8,
    degree: int = 0,
    budget: float = 0.5,
    seed: int = 0,
) -> Problem:
    """Draw a problem of ``num_groups`` layers with one option per bit-width and one budget in bytes.

    Args:
        num_groups: number of groups G.
        bits: available bit-widths, ascending.
        rank: number of columns of the factor; 0 for a linear problem, with costs only.
        degree: mean number of groups with which each group has sparse pair terms. If it is positive, the factor's
            products are kept for these pairs only, as the sparse part.
        budget: position of the budget between all groups at the fewest bits (0) and at the most bits (1).
        seed: seed of numpy's default generator.

    >>> layered_problem(3, rank=2).num_options
    18
    """
    rng = np.random.default_rng(seed)
    widths = np.array(bits, dtype=np.float64)
    size = np.exp(rng.normal(9.0, 1.2, num_groups)).round()  # number of weights of each layer
    amplitude = np.exp(rng.normal(0.0, 0.8, num_groups))
    dimensions = max(rank, 1)
    direction = rng.normal(size=(num_groups, 1, dimensions)) / np.sqrt(dimensions)
    noise = 0.3 * rng.normal(size=(num_groups, len(bits), dimensions)) / np.sqrt(dimensions)
    effect = amplitude[:, None, None] * 2.0 ** (1 - widths)[None, :, None] * (direction + noise)
    factor = effect.reshape(num_groups * len(bits), dimensions)
    size_bytes = np.ceil(size[:, None] * widths / 8).ravel()
    smallest, largest = size_bytes.reshape(num_groups, -1)[:, [0, -1]].sum(axis=0)
    if degree:
        pairs = PairTerms(sparse=_sparse_products(factor, len(bits), num_groups, degree, rng))
    else:
        pairs = PairTerms(factor=factor if rank else None)
    return Problem(
        [f"layer{g}" for g in range(num_groups)],
        [[f"{b} bits" for b in bits]] * num_groups,
        np.square(factor).sum(axis=1),
        {"bytes": size_bytes},
        {"bytes": float(np.floor(smallest + budget * (largest - smallest)))},
        pairs,
    )


def small_problem(seed: int, *, max_groups: int = 6, max_options: int = 4, resource_pairs: bool = False) -> Problem:
    """Draw a small problem with difficult features for solvers, which brute force can still check.

    The problem has one to ``max_groups`` groups of one to ``max_options`` options; sparse pair terms, a factor, both or
    neither; zero to three budgets on whole or fractional uses, which are loose, tight or met exactly, some with a fixed
    use; ties, zero and negative costs; and an offset. Each budget can be met alone, but perhaps not all together.
    With ``resource_pairs`` some resources of the same problem get pair terms (if it has two groups and a resource), and
    their budgets become the use of a random choice.

    >>> small_problem(7).num_groups <= 6
    True
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, max_options + 1, size=rng.integers(1, max_groups + 1))
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    num_options = len(group_of)
    cost = rng.normal(1.0, 1.0, num_options)
    if rng.random() < 0.3:
        cost = rng.integers(-1, 3, num_options).astype(np.float64)  # ties and zeros
    resources, budgets = {}, {}
    for k in range(rng.integers(0, 4)):
        integral = rng.random() < 0.6
        use = rng.integers(0, 9, num_options).astype(np.float64) if integral else rng.random(num_options)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        low, high = np.minimum.reduceat(use, starts).sum(), np.maximum.reduceat(use, starts).sum()
        share = rng.choice([0.0, 1.0, rng.random()], p=[0.1, 0.1, 0.8])
        budget = low + share * (high - low)
        resources[f"r{k}"] = use
        budgets[f"r{k}"] = float(np.ceil(budget)) if integral else float(budget)
    sparse = factor = None
    kind = rng.integers(4)
    if kind in (1, 3):
        upper = np.triu(group_of[:, None] != group_of[None, :]) * (rng.random((num_options, num_options)) < 0.4)
        sparse = scipy.sparse.csr_array(upper * rng.normal(0.0, 1.0, (num_options, num_options)))
    if kind in (2, 3):
        factor = rng.normal(0.0, 0.7, (num_options, rng.integers(1, 4)))
    offset = float(rng.choice([0.0, rng.normal()]))
    fixed = {}
    for name, use in resources.items():
        if rng.random() < 0.3:
            fixed[name] = float(rng.integers(1, 20)) if (use % 1 == 0).all() else float(rng.random())
            budgets[name] += fixed[name]
    problem = Problem(
        [f"g{g}" for g in range(len(sizes))],
        [[f"o{i}" for i in range(size)] for size in sizes],
        cost,
        resources,
        budgets,
        PairTerms(sparse=sparse, factor=factor),
        offset,
        fixed,
    )
    return _with_resource_pairs(problem, rng) if resource_pairs else problem


def _with_resource_pairs(problem: Problem, rng: np.random.Generator) -> Problem:
    """Draw pair terms for the first resource and half of the others; each such budget is what a random choice uses."""
    apart = np.triu(problem.group_of[:, None] != problem.group_of[None, :])
    terms: dict[str, scipy.sparse.csr_array] = {}
    for name, use in problem.resources.items():
        if not terms or rng.random() < 0.5:
            drawn = rng.integers(0, 6, apart.shape) if (use % 1 == 0).all() else rng.random(apart.shape)
            terms[name] = scipy.sparse.csr_array(apart * (rng.random(apart.shape) < rng.choice([0.4, 1.0])) * drawn)
    checked = checked_resource_pairs(terms, problem.resources, problem.group_of)
    paired = problem.derived(resource_pairs=MappingProxyType(checked))
    choice = problem.group_offsets[:-1] + rng.integers(0, np.diff(problem.group_offsets))
    return paired.with_budgets(**{name: paired.usage(choice)[name] for name in paired.paired_budgets})


def _sparse_products(
    factor: np.ndarray, num_bits: int, num_groups: int, degree: int, rng: np.random.Generator
) -> scipy.sparse.csr_array:
    """Compute the products of the factor's rows for ``num_groups·degree/2`` random pairs of groups."""
    wanted = num_groups * degree // 2
    drawn = rng.integers(0, num_groups, size=(4 * wanted + 8, 2))
    drawn = np.unique(np.sort(drawn[drawn[:, 0] != drawn[:, 1]], axis=1), axis=0)
    first, second = rng.permutation(drawn)[:wanted].T
    i, j = np.meshgrid(np.arange(num_bits), np.arange(num_bits), indexing="ij")
    rows = (first[:, None, None] * num_bits + i).ravel()
    columns = (second[:, None, None] * num_bits + j).ravel()
    values = np.einsum("nr,nr->n", factor[rows], factor[columns])
    return scipy.sparse.csr_array((values, (rows, columns)), shape=(len(factor), len(factor)))


def channel_problem(
    num_channels: int, *, per_layer: int = 500, rank: int = 64, keep: float = 0.5, seed: int = 0
) -> Problem:
    """Draw a problem of ``num_channels`` channels, each kept or pruned, with one budget in bytes.

    Each layer has ``per_layer`` channels of equal size. The effect of pruning a channel is half along a direction of
    its layer and half along a direction of the channel. Keeping a channel has no effect, so half of the factor is zero.

    Args:
        num_channels: number of groups G; there are twice as many options.
        per_layer: number of channels in a layer.
        rank: number of columns of the factor.
        keep: fraction of all bytes that may be kept.
        seed: seed of numpy's default generator.

    >>> channel_problem(3, rank=2).options[0]
    ('keep', 'prune')
    """
    rng = np.random.default_rng(seed)
    num_layers = -(-num_channels // per_layer)
    layer = np.arange(num_channels) // per_layer
    size_bytes = np.exp(rng.normal(6.0, 1.0, num_layers)).round()[layer]  # of each channel
    amplitude = np.exp(rng.normal(0.0, 0.5, num_layers))[layer] * np.exp(rng.normal(0.0, 0.8, num_channels))
    shared = rng.normal(size=(num_layers, rank))
    effect = rng.standard_normal((num_channels, rank))
    for first in range(0, num_channels, per_layer):
        effect[first : first + per_layer] += shared[first // per_layer]
    effect *= (amplitude / np.sqrt(2.0 * rank))[:, None]
    factor = np.zeros((2 * num_channels, rank))
    factor[1::2] = effect
    factor.flags.writeable = False  # lets `PairTerms` skip the copy
    cost = np.zeros((num_channels, 2))
    cost[:, 1] = np.einsum("cr,cr->c", effect, effect)
    del effect  # half a gigabyte for a million channels
    return Problem(
        [f"c{g}" for g in range(num_channels)],
        [("keep", "prune")] * num_channels,
        cost.ravel(),
        {"bytes": np.stack([size_bytes, np.zeros(num_channels)], axis=1).ravel()},
        {"bytes": float(np.floor(keep * size_bytes.sum()))},
        PairTerms(factor=factor),
    )
