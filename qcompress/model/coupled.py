"""Coupled sets: channels that are like each other, each with everything that goes when it goes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Axis:
    """Where a set's units lie in a tensor.

    Attributes:
        tensor: name of a parameter or buffer, the first where it has several.
        dim: of it.
        reads: whether its weights read the units (those of a removed one count for nothing in the masked network).
        indices: ``(units, per unit)`` of every unit.
    """

    tensor: str
    dim: int
    reads: bool
    indices: NDArray[np.int64]

    def to_json(self) -> dict[str, Any]:
        """The axis as plain JSON."""
        return {"tensor": self.tensor, "dim": self.dim, "reads": self.reads, "indices": self.indices.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Axis":
        """Undo `to_json`; KeyError or TypeError when it is not what that gives."""
        return cls(**{**value, "indices": np.array(value["indices"], dtype=np.int64)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoupledSet:
    """Units that take one decision together: how many of them stay.

    Attributes:
        axes: where they lie.
        work: share that one unit has in the products of activations of the whole network (a head of attention).
    """

    name: str
    axes: tuple[Axis, ...]
    work: float = 0.0

    @property
    def num_units(self) -> int:
        """How many there are; one of them always stays."""
        return len(self.axes[0].indices)

    def to_json(self) -> dict[str, Any]:
        """The set as plain JSON."""
        return {"name": self.name, "axes": [axis.to_json() for axis in self.axes], "work": self.work}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CoupledSet":
        """Undo `to_json`; KeyError or TypeError when it is not what that gives."""
        return cls(**{**value, "axes": tuple(map(Axis.from_json, value["axes"]))})
