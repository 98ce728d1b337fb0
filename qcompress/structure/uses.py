"""Bytes and multiply-accumulates of a network as functions of the units kept in every set, in product form.

A tensor has ``(a₀ + Σ_s a_s·n_s)`` indices along a dimension, where n_s units of set s stay, and as many elements as
the product of these over its dimensions; a layer's multiply-accumulates are proportional to the size of its weight. So
every use is a constant plus linear terms plus products of two counts, all with nonnegative factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from torch import nn

from qcompress.errors import ModelError
from qcompress.model.counting import Counted
from qcompress.model.coupled import CoupledSet
from qcompress.model.tensors import first_names, held_tensors, size_bytes

Extent = tuple[float, Mapping[int, float]]
"""Indices along a dimension that always stay, and for each set (by index) the indices per unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UseTerm:
    """``factor · Π (always + Σ per_unit·kept)`` over one or two dimensions."""

    factor: float
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """Resource uses as functions of the kept units; see the module's documentation.

    Attributes:
        products: for each resource the products that vary with the sets.
        fixed: for each resource the use that does not depend on any set.
    """

    products: MappingProxyType[str, tuple[UseTerm, ...]]
    fixed: MappingProxyType[str, float]

    def of(self, kept: Sequence[int]) -> dict[str, float]:
        """Return the uses when the given numbers of units are kept."""
        return {
            name: self.fixed[name]
            + sum(
                item.factor
                * float(np.prod([first + sum(kept[s] * a for s, a in per.items()) for first, per in item.extents]))
                for item in products
            )
            for name, products in self.products.items()
        }

    def tables(
        self, name: str, kept: Sequence[Sequence[int]]
    ) -> tuple[float, NDArray[np.float64], scipy.sparse.csr_array]:
        """Constant, ``(V,)`` linear and ``(V, V)`` strictly upper triangular pair part of a use.

        Args:
            name: name of the resource.
            kept: for every set the number of units that each of its options keeps.
        """
        counts = [np.asarray(options, dtype=np.float64) for options in kept]
        starts = np.cumsum([0, *map(len, counts)])
        constant, linear = self.fixed[name], np.zeros(starts[-1])
        pairs: dict[tuple[int, int], float] = {}
        for item in self.products[name]:
            (first, per_first), (second, per_second) = (*item.extents, (1.0, {}))[:2]
            constant += item.factor * first * second
            for slopes, rest in ((per_first, second), (per_second, first)):
                for s, each in slopes.items():
                    linear[starts[s] : starts[s + 1]] += item.factor * rest * each * counts[s]
            for s, a in per_first.items():
                for t, b in per_second.items():
                    if s == t:
                        linear[starts[s] : starts[s + 1]] += item.factor * a * b * counts[s] ** 2
                    else:
                        key = (min(s, t), max(s, t))
                        pairs[key] = pairs.get(key, 0.0) + item.factor * a * b
        blocks = [
            (
                starts[s] + np.arange(len(counts[s])),
                starts[t] + np.arange(len(counts[t])),
                factor * np.outer(counts[s], counts[t]),
            )
            for (s, t), factor in pairs.items()
        ]
        rows = [np.repeat(u, len(v)) for u, v, _ in blocks] or [np.zeros(0, dtype=np.int64)]
        columns = [np.tile(v, len(u)) for u, v, _ in blocks] or [np.zeros(0, dtype=np.int64)]
        values = [block.ravel() for _, _, block in blocks] or [np.zeros(0)]
        places = (np.concatenate(rows), np.concatenate(columns))
        matrix = scipy.sparse.coo_array((np.concatenate(values), places), shape=(starts[-1], starts[-1]))
        return float(constant), linear, scipy.sparse.csr_array(matrix)


def uses_of(model: nn.Module, sets: Sequence[CoupledSet], counted: Counted) -> Uses:
    """Bytes of all tensors and multiply-accumulates per sample of ``model``, as functions of the units kept.

    Args:
        model: the traced model.
        sets: coupled sets of the model.
        counted: counts of the model's operations on the data, from `qcompress.model.counting.count`.

    Raises:
        ModelError: sets lie along three dimensions of one tensor.
    """
    held = held_tensors(model)
    first, names = first_names(held), {id(item.tensor): item.name for item in reversed(held)}
    along: dict[str, dict[int, dict[int, float]]] = {}
    for place, item in enumerate(sets):
        for axis in item.axes:
            along.setdefault(axis.tensor, {}).setdefault(axis.dim, {})[place] = float(axis.indices.shape[1])
    size_of = {item.name: item.tensor for item in held}

    def product(name: str, whole: float) -> UseTerm:
        tensor = size_of[name]
        extents: list[Extent] = []
        for dim, per_unit in along.get(name, {}).items():
            inside = sum(sets[place].num_units * each for place, each in per_unit.items())
            extents.append((float(tensor.shape[dim] - inside), per_unit))
            whole /= tensor.shape[dim]
        if len(extents) > 2:
            raise ModelError(f"units lie along {len(extents)} dimensions of {name!r}, which is not supported")
        return UseTerm(factor=whole, extents=tuple(extents))

    in_bytes = [product(item.name, size_bytes(item.tensor)) for item in held if first[item.name] == item.name]
    in_macs, layers = [], 0.0
    for path, calls in counted.calls.items():
        weight = getattr(model.get_submodule(path), "weight", None)
        layers += calls.macs
        if weight is not None and id(weight) in names and calls.macs:
            in_macs.append(product(names[id(weight)], calls.macs))
    attention = max(counted.macs - layers, 0.0)
    in_macs += [
        UseTerm(factor=attention * item.work, extents=((0.0, {place: 1.0}),))
        for place, item in enumerate(sets)
        if item.work
    ]
    rest = attention * (1.0 - sum(item.work * item.num_units for item in sets))
    uncounted = layers - sum(
        calls.macs for path, calls in counted.calls.items() if hasattr(model.get_submodule(path), "weight")
    )
    products = {"bytes": in_bytes, "macs": in_macs}
    varying = {name: tuple(item for item in terms if item.extents) for name, terms in products.items()}
    always = {name: sum(item.factor for item in terms if not item.extents) for name, terms in products.items()}
    always["macs"] += rest + uncounted
    return Uses(products=MappingProxyType(varying), fixed=MappingProxyType(always))
