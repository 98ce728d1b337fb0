"""Coupled sets: interchangeable channels, each with everything that is removed together with it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Axis:
    """Positions of a set's units in a tensor.

    Attributes:
        tensor: name of a parameter or buffer; the first name if it has several.
        dim: dimension of the tensor.
        reads: whether its weights read the units; weights that read a removed unit have no effect.
        indices: ``(units, per unit)`` indices of every unit along ``dim``.
    """

    tensor: str
    dim: int
    reads: bool
    indices: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """Return the axis as plain JSON."""
        return {"tensor": self.tensor, "dim": self.dim, "reads": self.reads, "indices": self.indices.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Axis":
        """Undo `to_json`; KeyError or TypeError if ``value`` is not such JSON."""
        return cls(**{**value, "indices": np.array(value["indices"], dtype=np.int64)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoupledSet:
    """Units with one common decision: how many of them to keep.

    Attributes:
        name: unique name.
        axes: positions of the units in all tensors.
        work: share of one unit in the activation products of the whole network (for an attention head).
    """

    name: str
    axes: tuple[Axis, ...]
    work: float = 0.0

    @property
    def num_units(self) -> int:
        """Number of units; at least one always stays."""
        return len(self.axes[0].indices)

    def to_json(self) -> dict[str, Any]:
        """Return the set as plain JSON."""
        return {"name": self.name, "axes": [axis.to_json() for axis in self.axes], "work": self.work}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CoupledSet":
        """Undo `to_json`; KeyError or TypeError if ``value`` is not such JSON."""
        return cls(**{**value, "axes": tuple(map(Axis.from_json, value["axes"]))})
