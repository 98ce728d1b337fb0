"""Solve filter pruning exactly, by choosing counts instead of filters.

The filters of a set have equal size, so everything except L_p depends only on how many are pruned, and the best k
filters to prune are those with the k smallest scores. It remains to choose a count for every set and bits for every
layer. At a given γ the sets separate (`best_choice`, the proven optimum of H). Within a hard budget of bytes each set
is a group whose options are its Pareto-optimal pairs of count and bits, with their exact bytes (`filter_counts`, a
linear `Problem` that every solver accepts and ``dp`` solves with proof). γ is a price, not a budget: `fit_size` finds
it by bisection. Prices reach only the lower convex hull, so the hard budget never gives a larger loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError, InfeasibleBudgetError
from formulations.generators.filters.tables import (
    SCALE_BITS,
    FilterChoice,
    FilterEvaluation,
    FilterNetwork,
    FilterSet,
    Floats,
    Integers,
    stored_bytes,
)
from formulations.generators.prune_quantize import prune_quantize
from formulations.problem import Problem

MAX_OPTIONS = 2_000_000
"""Maximum number of options of one set while they are built."""

MAX_STEPS = 200


def best_choice(network: FilterNetwork, gamma: float) -> FilterChoice:
    """Return the choice that minimises ``H`` at ``gamma``, exactly, in ``O(filters · layers · bits)``.

    Args:
        network: the tables of the network.
        gamma: reward for removing all stored bits, ≥ 0.

    Raises:
        InvalidProblemError: ``gamma`` is negative or not finite.

    >>> from formulations.generators.filters.tables import FilterLayer
    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> choice = best_choice(FilterNetwork(layers=(layer,)), gamma=20.0)
    >>> choice.pruned[0].tolist(), choice.bits.tolist()
    ([False, True, False], [6])
    """
    worth = network.worth(gamma)
    pruned, bits = [], np.zeros(len(network.layers), dtype=np.int64)
    removable = np.arange(network.high_bits - network.low_bits + 1)
    for filter_set in network.sets:
        value = _count_losses(filter_set)
        count = np.arange(len(value))
        chosen = {}
        for place in filter_set.layers:
            layer = network.layers[place]
            kept = layer.weights_per_filter * (network.high_bits - removable) + SCALE_BITS  # bits of a kept filter
            table = network.beta * (layer.bit_score * removable) ** 2 + worth * np.outer(len(value) - count, kept)
            chosen[place] = table.argmin(axis=1)
            value = value + table.min(axis=1)
        best = int(value.argmin())
        pruned.append(_smallest(filter_set, best))
        for place, removed in chosen.items():
            bits[place] = network.high_bits - removed[best]
    return FilterChoice(pruned=tuple(pruned), bits=bits)


def fit_size(network: FilterNetwork, size_bytes: float) -> tuple[float, FilterChoice]:
    """Find the largest optimum of at most ``size_bytes`` that any γ gives, and return such a γ with it.

    A choice is optimal over a range of γ, at the ends of which another choice is equally good. The returned γ is the
    middle of this range.

    Raises:
        InfeasibleBudgetError: every choice takes more than ``size_bytes``.

    >>> from formulations.generators.filters.tables import FilterLayer
    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> network = FilterNetwork(layers=(layer,))
    >>> gamma, choice = fit_size(network, 20)
    >>> network.evaluate(choice).size_bytes
    19
    """

    def evaluation_at(gamma: float) -> FilterEvaluation:
        return network.evaluate(best_choice(network, gamma))

    smallest = FilterChoice(
        pruned=tuple(_smallest(filter_set, len(filter_set.scores) - 1) for filter_set in network.sets),
        bits=np.full(len(network.layers), network.low_bits),
    )
    if not (least := network.evaluate(smallest).size_bytes) <= size_bytes:  # "not <=" refuses NaN too
        raise InfeasibleBudgetError(
            f"no choice takes at most {size_bytes:,.6g} bytes: one filter per set at {network.low_bits} bits and the "
            f"fixed bytes take {least:,}"
        )
    if evaluation_at(0.0).size_bytes <= size_bytes:
        return 0.0, best_choice(network, 0.0)
    start = _first(lambda gamma: evaluation_at(gamma).size_bytes <= size_bytes, 0.0)
    choice = best_choice(network, start)
    if network.evaluate(choice).removed == network.evaluate(smallest).removed:
        return 2 * start, choice
    removed = network.evaluate(choice).removed
    end = _first(lambda gamma: evaluation_at(gamma).removed > removed, start)
    return 0.5 * (start + end), choice


def _first(reached: Callable[[float], bool], low: float) -> float:
    """Find the smallest γ above ``low`` from which ``reached`` is true, to nearly machine precision."""
    high = 2 * low or 1.0
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(MAX_STEPS):
        if high - low <= 1e-12 * high:
            break
        middle = 0.5 * (low + high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterCounts:
    """The problem over counts, with `decode` to map its choices to filters and bits.

    Attributes:
        problem: a linear problem with one group per set and the resource ``"bytes"``.
        network: the tables of the network.
        counts: ``(V,)`` number of filters pruned by each option.
        bits: for every set, an array ``(options, layers of the set)`` of bits.
    """

    problem: Problem
    network: FilterNetwork = field(repr=False)
    counts: Integers = field(repr=False)
    bits: tuple[Integers, ...] = field(repr=False)

    def decode(self, choice: ArrayLike) -> FilterChoice:
        """Convert a choice ``(G,)`` of the problem to filters and bits."""
        flat, bits = self.problem.flat(choice), np.zeros(len(self.network.layers), dtype=np.int64)
        starts, pruned = self.problem.group_offsets, []
        for place, filter_set in enumerate(self.network.sets):
            pruned.append(_smallest(filter_set, int(self.counts[flat[place]])))
            bits[list(filter_set.layers)] = self.bits[place][flat[place] - starts[place]]
        return FilterChoice(pruned=tuple(pruned), bits=bits)


def filter_counts(network: FilterNetwork, budget_bytes: float) -> FilterCounts:
    """State ``L_p + β·L_q`` within a hard budget as a linear problem, with the exact bytes of every option.

    Options that are worse than another one in both bytes and loss are left out, which loses no optimum.

    Args:
        network: the tables of the network.
        budget_bytes: upper limit on the bytes of the whole model, including `FilterNetwork.fixed_bytes`.

    Raises:
        EncodingError: the layers of a set have too many different sizes to combine their bits.

    >>> from formulations.generators.filters.tables import FilterLayer
    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> counts = filter_counts(FilterNetwork(layers=(layer,), fixed_bytes=100), 118)
    >>> counts.problem
    <Problem: 1 groups, 15 options, bytes <= 118, no pairs>
    >>> counts.decode([4]).bits.tolist(), counts.problem.evaluate([4]).usage
    ([6], {'bytes': 111.0})
    """
    tables = [_options(network, filter_set) for filter_set in network.sets]
    problem = prune_quantize(
        [filter_set.name for filter_set in network.sets],
        [_labels(counts, bits) for _, _, counts, bits in tables],
        np.concatenate([loss for _, loss, _, _ in tables]),
        {"bytes": np.concatenate([size for size, _, _, _ in tables])},
        {"bytes": budget_bytes},
        fixed={"bytes": network.fixed_bytes},
    )
    counts = np.concatenate([counts for _, _, counts, _ in tables])
    return FilterCounts(problem=problem, network=network, counts=counts, bits=tuple(bits for *_, bits in tables))


def _options(network: FilterNetwork, filter_set: FilterSet) -> tuple[Integers, Floats, Integers, Integers]:
    """Return the Pareto-optimal bytes, losses, counts ``(n,)`` and bits ``(n, layers)`` of a set, by rising bytes."""
    widths = np.arange(network.low_bits, network.high_bits + 1)
    columns = []
    for count, pruned_loss in enumerate(_count_losses(filter_set)):
        size, loss, bits = np.zeros(1, dtype=np.int64), np.array([pruned_loss]), np.zeros((1, 0), dtype=np.int64)
        for place in filter_set.layers:
            layer = network.layers[place]
            stored = stored_bytes(len(filter_set.scores), layer.weights_per_filter, count, widths)
            rise = network.beta * (layer.bit_score * (network.high_bits - widths)) ** 2
            if len(size) * len(widths) > MAX_OPTIONS:
                raise EncodingError(
                    f"the bits of the layers of {filter_set.name!r} combine to more than {MAX_OPTIONS:,} options; "
                    "allow fewer bit-widths, or use filter_problem()"
                )
            size = np.add.outer(size, stored).ravel()
            loss = np.add.outer(loss, rise).ravel()
            bits = np.column_stack([np.repeat(bits, len(widths), axis=0), np.tile(widths, len(bits))])
            kept = _pareto(size, loss)
            size, loss, bits = size[kept], loss[kept], bits[kept]
        columns.append((size, loss, np.full(len(size), count), bits))
    size, loss, counts, bits = (np.concatenate(column) for column in zip(*columns, strict=True))
    kept = _pareto(size, loss)
    return size[kept], loss[kept], counts[kept], bits[kept]


def _pareto(size: Integers, loss: Floats) -> Integers:
    """Return the indices of the Pareto-optimal options, without duplicates, by rising size."""
    order = np.lexsort((loss, size))
    least = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], loss[order][1:] < least[:-1]])
    return np.asarray(order[better])


def _labels(counts: Integers, bits: Integers) -> list[str]:
    return [
        f"{count} pruned, {'/'.join(map(str, widths))} bits"
        for count, widths in zip(counts.tolist(), bits.tolist(), strict=True)
    ]


def _count_losses(filter_set: FilterSet) -> Floats:
    """Return L_p of a set ``(N,)`` for 0 to N - 1 pruned filters, which are those with the smallest scores."""
    return np.asarray(np.square(np.concatenate([[0.0], np.cumsum(filter_set.scores[filter_set.order[:-1]])])))


def _smallest(filter_set: FilterSet, count: int) -> NDArray[np.bool_]:
    pruned = np.zeros(len(filter_set.scores), dtype=np.bool_)
    pruned[filter_set.order[:count]] = True
    return pruned
