"""Conversions between integer and floating-point convolutions, which depend on two neighbouring layers.

An integer convolution reads and writes codes, a floating-point one uses a memory layout of its own. Where the two meet,
the tensor between them is converted; between two of the same kind it is not. So the time of conversions is a pair term.
It is proportional to the size of the tensor. The time per number is measured with every second layer in integers, once
the even and once the odd ones: together these two models take as long as the dense and the all-integer model together,
plus the conversions.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.sparse

from qcompress.engines import onnx_integer

INTEGER = ("integer", False)
"""Kind of the options (see `qcompress.engines.onnx_clock`) that read and write codes, with weights of 8 bits."""


def reads_codes(kind: Hashable) -> bool:
    """Whether options of a kind read and write codes, whatever the bits of their weights."""
    return isinstance(kind, tuple) and kind[: len(INTEGER)] == INTEGER


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Two parts: the output of the first, a convolution, is the input of the second, possibly after other operators.

    Attributes:
        producer, consumer: indices of the parts.
        size: number of elements of the tensor, divided by the number of its producers.
    """

    producer: int
    consumer: int
    size: float

    def is_mixed(self, integers: set[int]) -> bool:
        """Whether exactly one of the two parts computes in integers."""
        return (self.producer in integers) != (self.consumer in integers)


def links(proto: Any, names: Mapping[int, str], sizes: Mapping[int, float]) -> list[Link]:
    """Return the links of a graph.

    Args:
        proto: graph of the dense model.
        names: mapping from parts to the initializers of their weights.
        sizes: mapping from parts to the numbers of elements of their inputs.
    """
    uses = {place: onnx_integer.uses(proto, name) for place, name in names.items()}
    producers = {use.output: place for place, products in uses.items() for use in products}
    convolutions = {place for place, products in uses.items() if any(use.operator == "Conv" for use in products)}
    makers = {output: node for node in proto.graph.node for output in node.output}
    all_links = []
    for place, products in uses.items():
        for use in products:
            nearest = _nearest(use.given, makers, producers)
            all_links += [
                Link(producer=producer, consumer=place, size=sizes[place] / len(nearest))
                for producer in nearest
                if producer in convolutions and producer != place
            ]
    return all_links


def _nearest(tensor: str, makers: Mapping[str, Any], producers: Mapping[str, int]) -> list[int]:
    """Return the parts from whose outputs a tensor is computed with the fewest operators."""
    seen, front = {tensor}, [tensor]
    while front:
        if reached := [producers[name] for name in front if name in producers]:
            return list(dict.fromkeys(reached))
        inputs = [name for made in front if made in makers for name in makers[made].input]
        front = [name for name in dict.fromkeys(inputs) if name and name not in seen]
        seen.update(front)
    return []


def halves(places: Sequence[int]) -> tuple[set[int], set[int]]:
    """Return every second part, starting with the first and with the second.

    >>> halves([0, 3, 5])
    ({0, 5}, {3})
    """
    return set(places[::2]), set(places[1::2])


def pair_terms(all_links: Sequence[Link], seconds: float, kinds: Sequence[Sequence[Hashable]]) -> Any:
    """Return the seconds of the conversions that pairs of options need.

    Args:
        all_links: the links of the graph.
        seconds: time to convert one number.
        kinds: the kind of every option of every part.

    Returns:
        ``(V, V)`` sparse, strictly upper triangular.
    """
    starts = [0]
    for part_kinds in kinds:
        starts.append(starts[-1] + len(part_kinds))
    terms: dict[tuple[int, int], float] = {}
    for link in all_links:
        for u, first in enumerate(kinds[link.producer], start=starts[link.producer]):
            for v, second in enumerate(kinds[link.consumer], start=starts[link.consumer]):
                if reads_codes(first) != reads_codes(second):
                    pair = (min(u, v), max(u, v))
                    terms[pair] = terms.get(pair, 0.0) + seconds * link.size
    coordinates = list(zip(*terms, strict=True)) if terms else ((), ())
    return scipy.sparse.csr_array((list(terms.values()), coordinates), shape=(starts[-1], starts[-1]))
