"""Tables of filters to prune and bits to remove in a convolutional network, and the evaluation of a choice.

The formulation is that of Wang et al. ("Is Quantum Optimization Ready?", arXiv 2505.16332): every filter is pruned or
kept, every layer loses some of its bits, and ``H = L_p + β·L_q − γ·R`` is minimised. With p = 1 for a pruned filter and
r bits removed from a layer,

    L_p = Σ_sets ( Σ_i score_i·p_i )²        L_q = Σ_layers ( bit_score·r )²        R = share of the stored bits removed

The paper does not define L_q and R in full; these are natural readings. A layer stores ``weights · bits + 32`` bits for
every kept filter (the weights and a float32 scale). R therefore contains products p·r, and H is quadratic.

The weights of a pruned filter become zero, while the filters that read its output do not change (masking semantics:
with coupled input channels R would be cubic). Layers whose outputs are added form a **set** with shared prune
variables. Their scores add up (``(Σ_n Σ_i score_ni·p_i)²`` is an upper bound on the sum of the layers' squares). The
filter with the largest score in a set is always kept, so that no layer is pruned completely. This loses nothing: among
the choices that keep a filter of the set, some optimal one keeps this filter. Bits lie within the given range, at
least 1.

If a score is the square root of the loss from pruning a filter alone, L_p bounds the second-order loss of pruning
several, by the triangle inequality. Such scores do not change if a layer is scaled and the next one is scaled back; the
scores of the paper, mean absolute weights, do change.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError

SCALE_BITS = 32
"""Number of bits that a kept filter stores besides its weights: one float32 scale."""

MOST_BITS = 32

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterLayer:
    """The table of one layer.

    Attributes:
        name: name of the layer, unique in the network.
        scores: ``(N,)`` score for pruning each filter (the sum over a set's pruned filters is squared).
        weights_per_filter: number of weights that each filter stores.
        bit_score: score for removing one bit (multiplied by the number of removed bits, then squared).
        tied: name of a set of layers in which filter i is pruned in all or in none; empty for the layer's name.

    Raises:
        InvalidProblemError: a number or a shape is invalid.
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
        name: name of the set.
        layers: indices of the layers in `FilterNetwork.layers`.
        scores: ``(N,)`` sum of the layers' scores for each filter.
        order: ``(N,)`` filters by rising score; the last one is always kept.
    """

    name: str
    layers: tuple[int, ...]
    scores: Floats
    order: Integers

    @property
    def prunable(self) -> Integers:
        """Filters that may be pruned ``(N - 1,)``, ascending."""
        return np.sort(self.order[:-1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterChoice:
    """A choice of the filters to prune and the bits to keep.

    Attributes:
        pruned: for every set of the network, ``(N,)`` flags of the pruned filters.
        bits: ``(L,)`` number of bits of every layer.
    """

    pruned: tuple[NDArray[np.bool_], ...]
    bits: Integers

    def __post_init__(self) -> None:
        object.__setattr__(self, "pruned", tuple(np.array(mask, dtype=np.bool_) for mask in self.pruned))
        object.__setattr__(self, "bits", np.array(self.bits, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterEvaluation:
    """Value of a choice: ``objective = prune_loss + β·bit_loss − γ·removed``, and its size in bytes."""

    objective: float
    prune_loss: float
    bit_loss: float
    removed: float
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterNetwork:
    """The tables of a network.

    Attributes:
        layers: tables of the L layers.
        low_bits, high_bits: smallest and largest number of bits per weight.
        beta: β, the weight of L_q.
        fixed_bytes: size of everything that is not up for choice, in bytes.
        sets: sets of layers that share their prune variables, in the order of their first layers.
        full_bits: number of stored bits when nothing is removed.

    Raises:
        InvalidProblemError: there are no layers, two layers have the same name, tied layers differ in their number of
            filters, or the range of bits is empty.

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
        """Number of filters (of sets, not of layers) that may be pruned."""
        return sum(len(filter_set.scores) - 1 for filter_set in self.sets)

    def worth(self, gamma: float) -> float:
        """Return γ per stored bit.

        Raises:
            InvalidProblemError: ``gamma`` is negative or not finite.
        """
        if not (np.isfinite(gamma) and gamma >= 0):
            raise InvalidProblemError(f"gamma must be a finite number, not negative, found {gamma!r}")
        return gamma / self.full_bits

    def evaluate(self, choice: FilterChoice, gamma: float = 0.0) -> FilterEvaluation:
        """Compute objective, losses and size of one choice.

        Raises:
            InvalidProblemError: the choice does not match the network, prunes a whole set, or has bits out of range.
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
        """Refuse a choice that does not match this network (see `evaluate`)."""
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
            raise InvalidProblemError(f"the choice prunes every filter of {emptied[0]!r}; at least one must be kept")
        if (wrong := (choice.bits < self.low_bits) | (choice.bits > self.high_bits)).any():
            layer = int(np.argmax(wrong))
            raise InvalidProblemError(
                f"the choice gives {self.layers[layer].name!r} {choice.bits[layer]} bits, "
                f"allowed are {self.low_bits} to {self.high_bits}"
            )


def stored_bytes(num_filters: int, weights_per_filter: int, num_pruned: ArrayLike, bits: ArrayLike) -> Integers:
    """Compute the bytes of a layer: packed codes and a float32 scale per kept filter, and a bitmap if any is pruned.

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
