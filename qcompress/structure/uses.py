"""Bytes and multiply-accumulates of a network as functions of the units kept in every set, in product form.

A tensor has ``(a₀ + Σ_s a_s·n_s)`` indices along a dimension, where n_s units of set s stay, and as many elements as
the product of these over its dimensions; the multiply-accumulates of products with a weight are proportional to its
size, or to the units whose positions it mixes, and those of products of activations to the units that they make. So
every use is a constant plus linear terms plus products of two counts, all with nonnegative factors. What else a model
multiplies (recurrent cells, weights computed from several parameters) is constant.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from torch import nn

from qcompress.errors import ModelError
from qcompress.model.counting import Counted
from qcompress.model.coupled import CoupledSet
from qcompress.model.tensors import first_names, held_tensors, size_bytes
from qcompress.structure.tabulated import Addends, Function, Tabulated

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

    def tabulate(self, name: str, table: Tabulated, kept: Sequence[Function]) -> None:
        """Add a use to a table.

        Args:
            name: name of the resource.
            table: the table.
            kept: for every set the decision that it is subject to, and the units that each of its options keeps.
        """
        table.add([(self.fixed[name], ())])
        for item in self.products[name]:
            table.add(product_of(item.factor, [addends(extent, kept) for extent in item.extents]))

    def tables(
        self, name: str, kept: Sequence[Sequence[int]]
    ) -> tuple[float, NDArray[np.float64], scipy.sparse.csr_array]:
        """Constant, ``(V,)`` linear and ``(V, V)`` strictly upper triangular pair part of a use.

        Args:
            name: name of the resource.
            kept: for every set the number of units that each of its options keeps.
        """
        table = Tabulated([len(options) for options in kept])
        self.tabulate(name, table, [(place, np.asarray(options, float)) for place, options in enumerate(kept)])
        return table.terms()


def addends(extent: Extent, kept: Sequence[Function]) -> Addends:
    """Return an extent as a sum, for the units kept by the options of every set's decision."""
    return [(extent[0], ()), *((each, (kept[place],)) for place, each in extent[1].items())]


def product_of(factor: float, sums: Sequence[Addends]) -> Addends:
    """Expand a product of sums."""
    expanded: Addends = [(factor, ())]
    for terms in sums:
        expanded = [(a * b, (*first, *second)) for a, first in expanded for b, second in terms if b]
    return expanded


def extents_of(sets: Sequence[CoupledSet], shapes: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Extent]]:
    """Return for each tensor that units lie along (by name) the extents of these dimensions.

    Args:
        sets: coupled sets of a model.
        shapes: shapes of its tensors by name.
    """
    along: dict[str, dict[int, dict[int, float]]] = {}
    for place, item in enumerate(sets):
        for axis in item.axes:
            along.setdefault(axis.tensor, {}).setdefault(axis.dim, {})[place] = float(axis.indices.shape[1])

    def always(name: str, dim: int, per_unit: Mapping[int, float]) -> float:
        return float(shapes[name][dim] - sum(sets[place].num_units * each for place, each in per_unit.items()))

    return {
        name: {dim: (always(name, dim, per_unit), per_unit) for dim, per_unit in dims.items()}
        for name, dims in along.items()
    }


def macs_of_weights(model: nn.Module, counted: Counted) -> dict[str, float]:
    """Return the multiply-accumulates per sample of all products with each weight, by its first name.

    Args:
        model: the model.
        counted: counts of its operations.
    """
    names = {id(item.tensor): item.name for item in reversed(held_tensors(model))}
    found = dict(counted.weights)
    for path, calls in counted.calls.items():
        weight = getattr(model.get_submodule(path), "weight", None)
        if id(weight) in names:
            found[names[id(weight)]] = found.get(names[id(weight)], 0.0) + calls.macs
    return found


def uses_of(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    counted: Counted,
    *,
    left_out: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Uses:
    """Return the bytes of all tensors and multiply-accumulates per sample of ``model``, as functions of the units kept.

    Args:
        model: the traced model.
        sets: coupled sets of the model.
        counted: counts of the model's operations on the data, from `qcompress.model.counting.count`.
        left_out: for a resource the names of tensors that are not counted.

    Raises:
        ModelError: sets lie along three dimensions of one tensor.
    """
    held = held_tensors(model)
    first, out = first_names(held), {name: left_out.get(name, ()) for name in ("bytes", "macs")}
    shapes = {item.name: item.tensor.shape for item in held}
    extents = extents_of(sets, shapes)

    def product(name: str, whole: float) -> UseTerm:
        dims = extents.get(name, {})
        if len(dims) > 2:
            raise ModelError(f"units lie along {len(dims)} dimensions of {name!r}, which is not supported")
        return UseTerm(factor=whole / math.prod(shapes[name][dim] for dim in dims), extents=tuple(dims.values()))

    in_bytes = [
        product(item.name, size_bytes(item.tensor))
        for item in held
        if first[item.name] == item.name and item.name not in out["bytes"]
    ]
    with_weights = macs_of_weights(model, counted)
    in_macs = [product(name, macs) for name, macs in with_weights.items() if macs and name not in out["macs"]]
    in_macs += [
        UseTerm(factor=macs * share, extents=((0.0, {place: 1.0}),))
        for place, item in enumerate(sets)
        for macs, share in (
            (counted.between, item.work),
            *((with_weights.get(name, 0.0), share) for name, share in item.mixed.items()),
        )
        if macs * share
    ]
    products = {"bytes": in_bytes, "macs": in_macs}
    varying = {name: tuple(item for item in terms if item.extents) for name, terms in products.items()}
    uses = Uses(products=MappingProxyType(varying), fixed=MappingProxyType(dict.fromkeys(products, 0.0)))
    elsewhere = sum(with_weights.get(name, 0.0) for name in out["macs"])
    rest = max(counted.macs - elsewhere - uses.of([item.num_units for item in sets])["macs"], 0.0)  # sums of floats
    fixed = {"bytes": sum(item.factor for item in in_bytes if not item.extents), "macs": rest}
    return replace(uses, fixed=MappingProxyType(fixed))
