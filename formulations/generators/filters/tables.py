"""Filters to prune and bits to remove: the tables of a convolutional network, a choice, and what a choice is worth.

The formulation of Wang et al. ("Is Quantum Optimization Ready?", arXiv 2505.16332): every filter is pruned or kept,
every layer loses some of its bits, and ``H = L_p + β·L_q − γ·R`` is minimised. With p = 1 for a pruned filter and r
bits removed from a layer,

    L_p = Σ_sets ( Σ_i score_i·p_i )²        L_q = Σ_layers ( bit_score·r )²        R = share of the stored bits removed

The paper does not print L_q and R in full; these are their natural readings. A layer stores ``weights · bits + 32``
bits for every filter it keeps (the weights and a float32 scale), so R holds products p·r, and H is quadratic.

What always holds: a pruned filter's weights are zero, while the filters that read its output stay as they are
(masking semantics: with coupled input channels R would be cubic). Layers whose outputs are added form a **set** that
shares its prune variables; their scores add up (``(Σ_n Σ_i score_ni·p_i)²`` is an upper bound on the sum of the
layers' own squares). The filter of largest score in a set is always kept: some optimum that leaves a filter keeps
that one, so nothing is lost, and no layer can be pruned wholly. Bits lie within the given range, at least 1.

If a score is the root of the loss of pruning a filter alone, L_p is the triangle inequality's bound on the
second-order loss of pruning several. Such scores do not change when a layer is scaled and the next one scaled back;
the paper's, mean absolute weights, do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError

SCALE_BITS = 32
"""What a kept filter stores besides its weights: one float32 scale."""

MOST_BITS = 32

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterLayer:
    """The table of one layer.

    Attributes:
        name: unique in the network.
        scores: ``(N,)`` what pruning each filter costs (squared together with the others of its set).
        weights_per_filter: weights that each filter stores.
        bit_score: what removing one bit costs (squared, with the number of bits removed).
        tied: name of the set of layers whose filter i is pruned in all or in none; its own name when empty.

    Raises:
        InvalidProblemError: the numbers do not make such a table.
    """

    name: str
    scores: Floats
    weights_per_filter: int
    bit_score: float
    tied: str = ""

    def __post_init__(self) -> None:
        try:
            scores, bit_score = np.array(self.scores, dtype=np.float64), float(self.bit_score)
        except (TypeError, ValueError) as error:
            raise InvalidProblemError(f"the scores of layer {self.name!r} must be numbers: {error}") from error
        if scores.ndim != 1 or not len(scores):
            raise InvalidProblemError(
                f"layer {self.name!r} needs one score per filter, shape (N,), found {scores.shape}"
            )
        if not (np.isfinite(scores).all() and (scores >= 0).all() and np.isfinite(bit_score) and bit_score >= 0):
            raise InvalidProblemError(f"the scores of layer {self.name!r} must be finite and not negative")
        if self.weights_per_filter < 1:
            raise InvalidProblemError(
                f"a filter of layer {self.name!r} must have at least one weight, found {self.weights_per_filter}"
            )
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)
        object.__setattr__(self, "bit_score", bit_score)
        object.__setattr__(self, "tied", self.tied or self.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterSet:
    """Layers that share their prune variables.

    Attributes:
        layers: places in `FilterNetwork.layers`.
        scores: ``(N,)`` the layers' scores added up.
        order: ``(N,)`` the filters by rising score; the last one is always kept.
    """

    name: str
    layers: tuple[int, ...]
    scores: Floats
    order: Integers

    @property
    def prunable(self) -> Integers:
        """``(N - 1,)`` filters that may be pruned, ascending."""
        return np.sort(self.order[:-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterChoice:
    """Which filters go and how many bits stay.

    Attributes:
        pruned: for every set of the network ``(N,)`` booleans.
        bits: ``(L,)`` bits of every layer.
    """

    pruned: tuple[NDArray[np.bool_], ...]
    bits: Integers

    def __post_init__(self) -> None:
        object.__setattr__(self, "pruned", tuple(np.array(mask, dtype=np.bool_) for mask in self.pruned))
        object.__setattr__(self, "bits", np.array(self.bits, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterEvaluation:
    """What a choice is worth: ``objective = prune_loss + β·bit_loss − γ·removed``, and the bytes it takes."""

    objective: float
    prune_loss: float
    bit_loss: float
    removed: float
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterNetwork:
    """The tables of a network.

    Attributes:
        layers: L tables.
        low_bits, high_bits: every layer keeps from ``low_bits`` to ``high_bits`` bits a weight.
        beta: β, the weight of L_q.
        fixed_bytes: everything that is not chosen about.
        sets: layers that share their prune variables, in the order of their first layers.
        full_bits: stored bits with nothing removed.

    Raises:
        InvalidProblemError: no layers, names twice, tied layers of different numbers of filters, an empty range.

    >>> layer = FilterLayer(name="conv", scores=[3, 1, 2], weights_per_filter=8, bit_score=0.5)
    >>> network = FilterNetwork(layers=(layer,), low_bits=2, high_bits=8)
    >>> worth = network.evaluate(FilterChoice(pruned=([False, True, False],), bits=[4]), gamma=9.0)
    >>> worth.prune_loss, worth.bit_loss, worth.removed, worth.objective, worth.size_bytes
    (1.0, 4.0, 0.5555555555555556, 0.0, 17)
    """

    layers: tuple[FilterLayer, ...]
    low_bits: int = 2
    high_bits: int = 8
    beta: float = 1.0
    fixed_bytes: int = 0
    sets: tuple[FilterSet, ...] = field(init=False)
    full_bits: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidProblemError("a network needs at least one layer, found none")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise InvalidProblemError(f"layer names must differ, found {max(names, key=names.count)!r} twice")
        if not 1 <= self.low_bits <= self.high_bits <= MOST_BITS:
            raise InvalidProblemError(
                f"bits must satisfy 1 <= low <= high <= {MOST_BITS}, found {self.low_bits} to {self.high_bits}"
            )
        if not (np.isfinite(self.beta) and self.beta >= 0 and self.fixed_bytes >= 0):
            raise InvalidProblemError(
                f"beta and fixed_bytes must not be negative, found {self.beta!r} and {self.fixed_bytes!r}"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "sets", _sets(self.layers))
        full = sum(
            len(layer.scores) * (layer.weights_per_filter * self.high_bits + SCALE_BITS) for layer in self.layers
        )
        object.__setattr__(self, "full_bits", full)

    @property
    def num_prunable(self) -> int:
        """Filters (of sets, not of layers) that may be pruned."""
        return sum(len(filter_set.scores) - 1 for filter_set in self.sets)

    def worth(self, gamma: float) -> float:
        """γ for each stored bit.

        Raises:
            InvalidProblemError: ``gamma`` is negative or not finite.
        """
        if not (np.isfinite(gamma) and gamma >= 0):
            raise InvalidProblemError(f"gamma must be a finite number, not negative, found {gamma!r}")
        return gamma / self.full_bits

    def evaluate(self, choice: FilterChoice, gamma: float = 0.0) -> FilterEvaluation:
        """Judge one choice.

        Raises:
            InvalidProblemError: it does not fit the network, prunes a whole set, or has bits out of the range.
        """
        self.require(choice)
        prune_loss = bit_loss = 0.0
        stored, size_bytes = 0, self.fixed_bytes
        for filter_set, pruned in zip(self.sets, choice.pruned, strict=True):
            prune_loss += float(filter_set.scores[pruned].sum()) ** 2
            for layer, bits in ((self.layers[place], int(choice.bits[place])) for place in filter_set.layers):
                bit_loss += (layer.bit_score * (self.high_bits - bits)) ** 2
                stored += int((~pruned).sum()) * (layer.weights_per_filter * bits + SCALE_BITS)
                size_bytes += int(stored_bytes(len(pruned), layer.weights_per_filter, int(pruned.sum()), bits))
        removed = 1.0 - stored / self.full_bits
        objective = prune_loss + self.beta * bit_loss - gamma * removed
        return FilterEvaluation(
            objective=objective, prune_loss=prune_loss, bit_loss=bit_loss, removed=removed, size_bytes=size_bytes
        )

    def require(self, choice: FilterChoice) -> None:
        """Refuse a choice that does not fit this network (see `evaluate`)."""
        shapes, given = (
            [filter_set.scores.shape for filter_set in self.sets],
            [pruned.shape for pruned in choice.pruned],
        )
        if given != shapes or choice.bits.shape != (len(self.layers),):
            raise InvalidProblemError(
                f"the choice is for sets of filters of shapes {given} and layers of shape {choice.bits.shape}, "
                f"the network has sets of shapes {shapes} and {len(self.layers)} layers"
            )
        if emptied := [
            filter_set.name for filter_set, pruned in zip(self.sets, choice.pruned, strict=True) if pruned.all()
        ]:
            raise InvalidProblemError(f"the choice prunes every filter of {emptied[0]!r}; at least one must stay")
        if (wrong := (choice.bits < self.low_bits) | (choice.bits > self.high_bits)).any():
            layer = int(np.argmax(wrong))
            raise InvalidProblemError(
                f"the choice gives {self.layers[layer].name!r} {choice.bits[layer]} bits, "
                f"allowed are {self.low_bits} to {self.high_bits}"
            )


def stored_bytes(num_filters: int, weights_per_filter: int, num_pruned: ArrayLike, bits: ArrayLike) -> Integers:
    """Bytes of a layer: codes of the kept filters, packed; a float32 scale each; where any is pruned, a bitmap.

    >>> stored_bytes(3, 8, [0, 1, 2], [8, 4, 4]).tolist()
    [36, 17, 9]
    """
    pruned = np.asarray(num_pruned, dtype=np.int64)
    kept = num_filters - pruned
    codes = -(-kept * weights_per_filter * np.asarray(bits, dtype=np.int64) // 8)
    return np.asarray(codes + kept * (SCALE_BITS // 8) + np.where(pruned > 0, -(-num_filters // 8), 0))


def _sets(layers: Sequence[FilterLayer]) -> tuple[FilterSet, ...]:
    places: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer.tied, []).append(place)
    sets = []
    for name, members in places.items():
        counts = {layers[place].name: len(layers[place].scores) for place in members}
        if len(set(counts.values())) > 1:
            raise InvalidProblemError(f"tied layers must have equally many filters, found {counts} in {name!r}")
        scores = np.sum([layers[place].scores for place in members], axis=0)
        order = np.argsort(scores, kind="stable")
        scores.flags.writeable = order.flags.writeable = False
        sets.append(FilterSet(name=name, layers=tuple(members), scores=scores, order=order))
    return tuple(sets)
