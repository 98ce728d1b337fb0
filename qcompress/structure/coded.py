"""Layers whose codes are chosen together with their channels, and their exact bytes and multiply-accumulates.

The bytes of a layer are rows times columns times bits, and rows and columns depend on the units kept in coupled sets.
A problem has terms of two decisions at most. So the codes of a layer with rows in one set and columns in others belong
to the decision of a set: its options are then combinations of a width and codes. Codes of a layer with a fixed side are
a decision of their own. Factors of a fixed rank are codes as well; their uses grow with rows and with columns, not with
the product.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part
from qcompress.model.tensors import held_tensors
from qcompress.structure.tabulated import Addends, Function
from qcompress.structure.uses import Extent, addends, extents_of, product_of
from qcompress.transforms.base import Target, Transform

USES: Mapping[str, Callable[[Transform, Target], float]] = MappingProxyType(
    {
        "bytes": lambda transform, target: transform.size_bytes(target),
        "macs": lambda transform, target: transform.macs(target),
    }
)
"""Name of a resource → use of a weight."""

LARGE = 1 << 10
"""Multiple of the rows and columns at which uses are compared to find how they depend on them."""

MAX_ROUNDING = 2.0
"""Bytes by which the size of a stored matrix may differ from the form: codes and masks are rounded to whole bytes."""

SAME = 1e-9
"""Difference of multiply-accumulates from the form, relative to the largest ones: these are not rounded."""

MAX_SHAPES = 4096
"""Largest number of shapes for which the rounding is found exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLayer:
    """A layer whose codes can be chosen together with channels.

    Attributes:
        part: the whole layer.
        rows: rows of its weight as a function of the units kept in every set (by index).
        columns: columns of its weight likewise.
        home: index of the set whose decision includes the codes; None for a decision of their own.
    """

    part: Part
    rows: Extent
    columns: Extent
    home: int | None

    def shapes(self, kept: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
        """Return the shapes that the weight may have, for the numbers of units that may stay; empty ones left out."""
        rows, columns = (sorted({round(value) for value in _values(side, kept)} - {0}) for side in self._sides)
        return list(itertools.product(rows, columns))

    def why_not(self, transform: Transform, kept: Mapping[int, Sequence[int]]) -> str:
        """Return why a transform does not fit a shape that the weight may have, or an empty string."""
        for rows, columns in self.shapes(kept):
            if why := transform.unfit(self.part.target.of_shape(rows, columns)):
                return f"of the {rows}×{columns} weights that may stay, {why}"
        return ""

    def may_vanish(self, kept: Mapping[int, Sequence[int]]) -> bool:
        """Whether several sets together may leave no rows or no columns, which no term of two decisions states."""
        return any(len(side[1]) > 1 and _values(side, kept)[0] <= 0 for side in self._sides)

    @property
    def _sides(self) -> tuple[Extent, Extent]:
        return self.rows, self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class UseForm:
    """Use of a coded weight: ``area·rows·columns + row·rows + column·columns + constant``."""

    area: float
    row: float
    column: float
    constant: float

    def of(self, rows: float, columns: float) -> float:
        """Return the use of a weight of this shape."""
        return self.area * rows * columns + self.row * rows + self.column * columns + self.constant


def coded_layers(
    model: nn.Module, sets: Sequence[CoupledSet], parts: Sequence[Part]
) -> tuple[list[CodedLayer], dict[str, str]]:
    """Find the layers whose codes can be chosen together with channels.

    Args:
        model: the model.
        sets: its coupled sets.
        parts: whole layers that codes are on offer for.

    Returns:
        The layers, and for each other one (by name) the reason why not.
    """
    tensors = {item.name: item.tensor for item in held_tensors(model)}
    extents = extents_of(sets, {name: tensor.shape for name, tensor in tensors.items()})
    found, reasons, seen = [], {}, dict[int, int]()
    for part in parts:
        site = part.site(model)
        sides: list[Extent] = [(1.0, {}), (1.0, {})]
        odd = len(part.modules) > 1 or part.rows is not None
        for dim, size in enumerate(site.weight.shape):
            extent = extents.get(part.state_name, {}).get(dim, (float(size), {}))
            side = _side(site.to_rows(_along(site.weight.shape, dim))) if size > 1 else 1
            if side is None or (sides[side][1] and extent[1]):
                odd = True
                continue
            sides[side] = _times(sides[side], extent)
        if odd:
            reasons[part.name] = "its weight is shared or not a matrix, so its codes are not chosen with channels"
            continue
        rows, columns = sides
        layer = CodedLayer(part=part, rows=rows, columns=columns, home=None)
        if any(first != second for first in rows[1] for second in columns[1]):
            single = [next(iter(side[1])) for side in sides if len(side[1]) == 1]
            if not single:
                reasons[part.name] = "its inputs and outputs belong to several coupled sets each"
                continue
            layer = CodedLayer(part=part, rows=rows, columns=columns, home=single[0])
        seen |= {place: seen.get(place, 0) + 1 for place in {*rows[1], *columns[1]}}
        found.append(layer)
    return [_at_home(layer, seen) for layer in found], reasons


def _at_home(layer: CodedLayer, seen: Mapping[int, int]) -> CodedLayer:
    """Give the codes to the one of two sets that fewer layers lie along."""
    if layer.home is None or not len(layer.rows[1]) == len(layer.columns[1]) == 1:
        return layer
    home = min((*layer.rows[1], *layer.columns[1]), key=lambda place: seen[place])
    return CodedLayer(part=layer.part, rows=layer.rows, columns=layer.columns, home=home)


def use_form(
    resource: str, transform: Transform, layer: CodedLayer, kept: Mapping[int, Sequence[int]]
) -> UseForm | None:
    """Return a use as a function of the shape, never too little; None if it has no such form.

    Args:
        resource: name of the resource, one of `USES`.
        transform: how the layer is stored.
        layer: the layer.
        kept: for every set (by index) the numbers of units that may stay.
    """

    def use(rows: int, columns: int) -> float:
        return float(USES[resource](transform, target.of_shape(rows, columns)))

    target = layer.part.target
    rows, columns = LARGE * target.channels, LARGE * target.per_channel
    corners = np.array([[use(a * rows, b * columns) for b in (1, 2)] for a in (1, 2)])
    area = (corners[1, 1] - corners[0, 1] - corners[1, 0] + corners[0, 0]) / (rows * columns)
    row = (corners[1, 0] - corners[0, 0]) / rows - area * columns
    column = (corners[0, 1] - corners[0, 0]) / columns - area * rows
    form = UseForm(area=area, row=row, column=column, constant=0.0)
    shapes = [shape for shape in layer.shapes(kept) if not transform.unfit(target.of_shape(*shape))]
    if not shapes:
        return None
    tested = shapes if len(shapes) <= MAX_SHAPES else shapes[:: len(shapes) // MAX_SHAPES]
    uses = [use(*shape) for shape in tested]
    excess = [used - form.of(*shape) for used, shape in zip(uses, tested, strict=True)]
    rounding = MAX_ROUNDING * num_matrices(transform, target) if resource == "bytes" else SAME * max(uses)
    if max(excess) - min(excess) > 2 * rounding:
        return None
    constant = max(excess) if tested is shapes else max(*excess, min(excess) + rounding)
    return replace(form, constant=constant)


def num_matrices(transform: Transform, target: Target) -> int:
    """Return the number of matrices that a weight is stored as: one, or its factors."""
    return max(len(transform.factor_targets(target)), 1)


def use_addends(
    layer: CodedLayer, codes: int, forms: Sequence[UseForm], choice: Sequence[int], kept: Sequence[Function]
) -> Addends:
    """Return a use of a layer as a sum of products.

    Args:
        layer: the layer.
        codes: index of the decision that includes its codes.
        forms: form of each of its transforms.
        choice: for every option of that decision the index of the transform.
        kept: for every set the decision that it is subject to, and the units that each of its options keeps.
    """
    rows, columns = addends(layer.rows, kept), addends(layer.columns, kept)
    terms: Addends = []
    some_rows, some_columns = (_unless_empty(side, kept) for side in (layer.rows, layer.columns))
    for name, sides in (
        ("area", [rows, columns]),
        ("row", [rows, some_columns]),
        ("column", [some_rows, columns]),
        ("constant", [some_rows, some_columns]),
    ):
        values = np.array([getattr(forms[index], name) for index in choice])
        terms += product_of(1.0, [[(1.0, ((codes, values),))], *sides])
    return terms


def _unless_empty(side: Extent, kept: Sequence[Function]) -> Addends:
    """Return 1, or 0 where no rows or columns are left: then nothing is stored, not even scales."""
    always, per_unit = side
    if always or len(per_unit) != 1:
        return [(1.0, ())]
    decision, counts = kept[next(iter(per_unit))]
    return [(1.0, ((decision, (counts > 0).astype(np.float64)),))]


def _values(side: Extent, kept: Mapping[int, Sequence[int]]) -> list[float]:
    """Return the values of an extent for all numbers of units that may stay."""
    values = {side[0]}
    for place, each in side[1].items():
        values = {value + each * count for value in values for count in kept[place]}
    return sorted(values)


def _times(first: Extent, second: Extent) -> Extent:
    """Return the product of two extents, of which at most one depends on sets."""
    constant, varying = (second[0], first) if first[1] or not second[1] else (first[0], second)
    return constant * varying[0], {place: constant * each for place, each in varying[1].items()}


def _along(shape: Sequence[int], dim: int) -> torch.Tensor:
    """Return a tensor that holds the index along ``dim`` everywhere."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim], dtype=torch.float32).view(view).expand(*shape)


def _side(rows: torch.Tensor) -> int | None:
    """Whether values vary along the rows (0) or the columns (1) only; None if along both."""
    if bool((rows == rows[:, :1]).all()):
        return 0
    return 1 if bool((rows == rows[:1]).all()) else None
