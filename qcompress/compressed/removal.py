"""Cut removed units out of a model, or mask them; both compute the same function.

In the **masked** network, the weights that read a removed unit are zero, so that its values have no effect. In the
**smaller** network, the unit is cut out of every tensor (`qcompress.compressed.cutting`). If all units of a set are
removed, the modules that made their values are replaced (`qcompress.compressed.bypassed`).
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from qcompress.compressed.bypassed import bypass_, name_after
from qcompress.compressed.cutting import cut_
from qcompress.errors import ModelError
from qcompress.model.composed import compose_
from qcompress.model.coupled import Bypass, CoupledSet
from qcompress.model.tensors import held_tensors

Removed = Mapping[str, ArrayLike]
"""Name of a set → its units to remove."""

Model = TypeVar("Model", bound=nn.Module)


def mask_(model: Model, sets: Sequence[CoupledSet], removed: Removed) -> Model:
    """Set the weights that read removed units to zero, in place; computed weights become plain parameters.

    Raises:
        ModelError: same as in `remove_`.
    """
    compose_(model)
    tensors = {item.name: item.tensor for item in held_tensors(model)}
    with torch.no_grad():
        for item, units in _chosen(sets, removed):
            for axis in item.axes:
                if axis.reads:
                    tensor = tensors[axis.tensor]
                    indices = torch.from_numpy(np.unique(axis.indices[units])).to(tensor.device)
                    tensor.index_fill_(axis.dim, indices, 0.0)
    return model


def remove_(model: Model, sets: Sequence[CoupledSet], removed: Removed) -> Model:
    """Cut removed units out of every tensor, in place; computed weights become plain parameters.

    Raises:
        ModelError: a set or unit does not exist, or no unit of a set would remain that has no bypass.

    >>> from qcompress.structure.find import find_sets
    >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sets = find_sets(model, [torch.randn(4, 3)]).sets
    >>> remove_(model, sets, {"0": [0, 5]})
    Sequential(
      (0): Linear(in_features=3, out_features=6, bias=True)
      (1): ReLU()
      (2): Linear(in_features=6, out_features=2, bias=True)
    )
    """
    compose_(model)
    bypass_(model, bypasses_of(sets, removed))
    cut_(model, cuts_of(sets, removed))
    return model


def bypasses_of(sets: Sequence[CoupledSet], removed: Removed) -> tuple[Bypass, ...]:
    """Return the modules to bypass: those of sets that are removed as a whole."""
    return tuple(
        bypass for item, units in _chosen(sets, removed) if len(units) == item.num_units for bypass in item.bypasses
    )


def cuts_of(sets: Sequence[CoupledSet], removed: Removed) -> dict[tuple[str, int], list[int]]:
    """Return the cuts that `qcompress.compressed.cutting.cut_` has to make once modules are bypassed."""
    bypasses = bypasses_of(sets, removed)
    cuts: dict[tuple[str, int], set[int]] = {}
    for item, units in _chosen(sets, removed):
        for axis in item.axes:
            if (name := name_after(bypasses, axis.tensor)) is not None:
                cuts.setdefault((name, axis.dim), set()).update(axis.indices[units].ravel().tolist())
    return {place: sorted(indices) for place, indices in cuts.items()}


def _chosen(sets: Sequence[CoupledSet], removed: Removed) -> list[tuple[CoupledSet, NDArray[np.int64]]]:
    """Return the sets with their units to remove."""
    known = {item.name: item for item in sets}
    chosen = []
    for name, given in removed.items():
        if name not in known:
            raise ModelError(f"there is no coupled set {name!r}; there are: {', '.join(known)}")
        units, count = np.unique(np.asarray(given, dtype=np.int64)), known[name].num_units
        if len(units) and not 0 <= units[0] <= units[-1] < count:
            raise ModelError(f"set {name!r} has units 0..{count - 1}, asked to remove {units.tolist()}")
        if len(units) == count and not known[name].bypasses:
            raise ModelError(f"removing all {count} units of {name!r} would cut the network in two; one must stay")
        if len(units):
            chosen.append((known[name], units))
    return chosen
