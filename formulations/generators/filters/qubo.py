"""State ``H = L_p + β·L_q − γ·R`` over single filters as a `Problem` and as the unconstrained QUBO of the paper.

Both state the same function of the same choices (`formulations.generators.filters.tables`, arXiv 2505.16332). In the
`Problem` every prunable filter is a group of two options, and every layer is a group of bit-widths. The L_p of each set
is one column of the factor, and R's products of a pruned filter and removed bits are sparse pair terms. There is no
budget: γ is the price of size (`formulations.generators.filters.counts.fit_size` finds the γ for a size;
``filter_counts`` is the form with a hard budget). In the QUBO the bits of a layer are ``high_bits − Σ_k weight_k·q_k``,
with weights 1, 2, 4, … and a last one chosen so that the sum reaches ``high_bits − low_bits`` and no more. Every sample
is then a valid choice, without a penalty.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError, InvalidProblemError
from formulations.forms.couplings import MAX_PAIRS
from formulations.generators.filters.tables import SCALE_BITS, FilterChoice, FilterNetwork, Integers
from formulations.pairs import PairTerms
from formulations.problem import Problem

if TYPE_CHECKING:
    import dimod


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterProblem:
    """The problem over filters and bits, with maps between its choices and filter choices.

    Attributes:
        problem: the problem: first a group "keep, prune" for every prunable filter, then a group of bit-widths for
            every layer, most bits first.
        network: the tables of the network.
    """

    problem: Problem
    network: FilterNetwork = field(repr=False)

    def decode(self, choice: ArrayLike) -> FilterChoice:
        """Convert a choice ``(G,)`` of the problem to filters and bits."""
        local = self.problem.flat(choice) - self.problem.group_offsets[:-1]
        count = self.network.num_prunable
        return FilterChoice(
            pruned=_spread(self.network, local[:count] == 1), bits=self.network.high_bits - local[count:]
        )

    def encode(self, choice: FilterChoice) -> Integers:
        """Convert filters and bits to a choice of the problem, the inverse of `decode`."""
        self.network.require(choice)
        return np.concatenate([_gathered(self.network, choice), self.network.high_bits - choice.bits]).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterBqm:
    """The QUBO of the paper, with `decode` to map its samples to filters and bits.

    Attributes:
        bqm: the model, with variables ``0, 1, …``: first the prunable filters, set after set, then the code of every
            layer.
        network: the tables of the network.
        weights: ``(K,)`` number of bits that each variable of a layer's code removes.
    """

    bqm: "dimod.BinaryQuadraticModel"
    network: FilterNetwork = field(repr=False)
    weights: Integers

    def decode(self, sample: Mapping[Any, int] | ArrayLike) -> FilterChoice:
        """Convert a sample to a choice; it is a mapping variable → 0/1, or the values in the order ``0, 1, …``.

        Raises:
            EncodingError: the sample does not match the model's variables.
        """
        try:
            values = [sample[v] for v in range(self.bqm.num_variables)] if isinstance(sample, Mapping) else sample
        except KeyError as error:
            raise EncodingError(f"the sample lacks variable {error} of the model") from error
        bits = np.asarray(values, dtype=np.int64)
        if bits.shape != (self.bqm.num_variables,):
            raise EncodingError(
                f"a sample has one value for each of {self.bqm.num_variables} variables, found shape {bits.shape}"
            )
        count = self.network.num_prunable
        removed = bits[count:].reshape(len(self.network.layers), -1) @ self.weights
        return FilterChoice(pruned=_spread(self.network, bits[:count] == 1), bits=self.network.high_bits - removed)


def filter_problem(network: FilterNetwork, gamma: float) -> FilterProblem:
    """State ``H`` at ``gamma`` as a problem without budgets, for any solver.

    Raises:
        InvalidProblemError: ``gamma`` is negative or not finite.

    >>> from formulations.generators.filters.tables import FilterLayer
    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> stated = filter_problem(FilterNetwork(layers=(layer,)), gamma=10.0)
    >>> stated.problem
    <Problem: 3 groups, 11 options, no budget, factor rank 1, 12 sparse pair terms>
    >>> stated.decode([1, 0, 4]).bits.tolist()
    [4]
    """
    worth, count = network.worth(gamma), network.num_prunable
    removed = np.arange(network.high_bits - network.low_bits + 1)
    prune = 2 * np.arange(count) + 1  # flat indices of the "prune" options
    cost, factor = [np.zeros(2 * count)], np.zeros((2 * count + len(removed) * len(network.layers), len(network.sets)))
    groups, entries, start = [], [], 0
    for column, filter_set in enumerate(network.sets):
        options, scores = prune[start : start + len(filter_set.prunable)], filter_set.scores[filter_set.prunable]
        groups += [f"{filter_set.name}[{index}]" for index in filter_set.prunable]
        cost[0][options] = np.square(scores) - worth * _filter_bits(network, filter_set.layers)
        factor[options, column] = np.sqrt(2.0) * scores  # a pair of one set adds 2·score·score
        for place in filter_set.layers:
            places = 2 * count + place * len(removed) + removed[1:]  # the option that removes no bits has no pair terms
            value = worth * network.layers[place].weights_per_filter * removed[1:]
            entries.append(
                (np.repeat(options, len(places)), np.tile(places, len(options)), np.tile(value, len(options)))
            )
        start += len(options)
    set_of = {place: filter_set for filter_set in network.sets for place in filter_set.layers}
    for place, layer in enumerate(network.layers):
        saved = len(set_of[place].scores) * layer.weights_per_filter * removed
        cost.append(network.beta * np.square(layer.bit_score * removed) - worth * saved)
    rows, columns, values = (np.concatenate(part) for part in zip(*entries, strict=True))
    problem = Problem(
        [*groups, *(f"{layer.name} bits" for layer in network.layers)],
        [["keep", "prune"]] * count + [[f"{network.high_bits - r} bits" for r in removed]] * len(network.layers),
        np.concatenate(cost),
        {},
        {},
        PairTerms(
            sparse=scipy.sparse.csr_array((values, (rows, columns)), shape=(len(factor), len(factor))),
            factor=factor,
        ),
    )
    return FilterProblem(problem=problem, network=network)


def filter_bqm(network: FilterNetwork, gamma: float) -> FilterBqm:
    """State ``H`` at ``gamma`` as the paper's unconstrained QUBO, with a bit per filter and a binary code per layer.

    The energy of a sample is the ``objective`` of `FilterNetwork.evaluate`.

    Raises:
        InvalidProblemError: ``gamma`` is negative or not finite.
        EncodingError: the model would couple too many pairs.

    >>> from formulations.generators.filters.tables import FilterLayer
    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> encoded = filter_bqm(FilterNetwork(layers=(layer,)), gamma=10.0)
    >>> encoded.weights.tolist(), encoded.bqm.num_variables
    ([1, 2, 3], 5)
    >>> encoded.decode([1, 0, 1, 0, 1]).bits.tolist()
    [4]
    """
    import dimod

    worth, weights, count = network.worth(gamma), code_weights(network.high_bits - network.low_bits), 0
    pairs = sum(len(filter_set.prunable) * (len(filter_set.prunable) - 1) // 2 for filter_set in network.sets)
    if pairs > MAX_PAIRS:
        raise EncodingError(
            f"every set of filters is coupled completely: {pairs} pairs, more than {MAX_PAIRS}; "
            "filter_problem() keeps them as a factor"
        )
    linear = np.zeros(network.num_prunable + len(weights) * len(network.layers))
    first, second = np.triu_indices(len(weights), 1)
    terms: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for filter_set in network.sets:
        filters, scores = count + np.arange(len(filter_set.prunable)), filter_set.scores[filter_set.prunable]
        linear[filters] = np.square(scores) - worth * _filter_bits(network, filter_set.layers)
        i, j = np.triu_indices(len(filters), 1)
        terms.append((filters[i], filters[j], 2 * scores[i] * scores[j]))
        for place in filter_set.layers:
            layer, code = network.layers[place], network.num_prunable + place * len(weights) + np.arange(len(weights))
            loss = network.beta * layer.bit_score**2
            linear[code] = loss * weights**2 - worth * len(filter_set.scores) * layer.weights_per_filter * weights
            terms.append((code[first], code[second], 2 * loss * weights[first] * weights[second]))
            product = worth * layer.weights_per_filter * weights
            terms.append((np.repeat(filters, len(code)), np.tile(code, len(filters)), np.tile(product, len(filters))))
        count += len(filters)
    couplings = tuple(np.concatenate(part) for part in zip(*terms, strict=True))
    bqm = dimod.BinaryQuadraticModel.from_numpy_vectors(linear, couplings, 0.0, dimod.BINARY)
    return FilterBqm(bqm=bqm, network=network, weights=weights)


def code_weights(most: int) -> Integers:
    """Return the weights of a binary code that reaches every number from 0 to ``most`` and no more.

    >>> code_weights(7).tolist(), code_weights(6).tolist(), code_weights(0).tolist()
    ([1, 2, 4], [1, 2, 3], [])
    """
    powers = [1 << k for k in range(most.bit_length() - 1)]
    return np.array([*powers, most - sum(powers)] if most else [], dtype=np.int64)


def _filter_bits(network: FilterNetwork, layers: tuple[int, ...]) -> int:
    """Return the number of bits that a filter of tied layers stores when no bits are removed."""
    return sum(network.layers[place].weights_per_filter * network.high_bits + SCALE_BITS for place in layers)


def _spread(network: FilterNetwork, values: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
    """Distribute values of the prunable filters to all filters of every set."""
    ends = np.cumsum([len(filter_set.prunable) for filter_set in network.sets])
    pruned = []
    for filter_set, chosen in zip(network.sets, np.split(values, ends[:-1]), strict=True):
        pruned.append(np.zeros(len(filter_set.scores), dtype=np.bool_))
        pruned[-1][filter_set.prunable] = chosen
    return tuple(pruned)


def _gathered(network: FilterNetwork, choice: FilterChoice) -> NDArray[np.bool_]:
    """Collect the values of the prunable filters, the inverse of `_spread`.

    Raises:
        InvalidProblemError: a filter that must always be kept is pruned.
    """
    for filter_set, pruned in zip(network.sets, choice.pruned, strict=True):
        if pruned[filter_set.order[-1]]:
            raise InvalidProblemError(
                f"the choice prunes filter {filter_set.order[-1]} of {filter_set.name!r}, whose score is the largest: "
                "it must be kept"
            )
    return np.concatenate(
        [pruned[filter_set.prunable] for filter_set, pruned in zip(network.sets, choice.pruned, strict=True)]
    )
