"""Coupled sets: interchangeable channels, each with everything that is removed together with it.

If a whole set is removed, such as all heads of an attention layer, the modules that made its values have nothing left
to compute. They are replaced (`Bypass`), so that neither their weights nor their time remain.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bypass:
    """A module that computes nothing once all units of a set are removed, and what it then returns.

    Attributes:
        path: path of the module.
        reader: path of the layer in it that reads the units: its bias is the output, or zeros of the input's shape if
            it has no bias. None if the units are the output, of which nothing remains.
        outputs: length of the tuple that it returns, of which only the first entry counts; None for a tensor.
    """

    path: str
    reader: str | None = None
    outputs: int | None = None

    def holds(self, name: str) -> bool:
        """Whether the module holds a tensor or module of this name."""
        return f"{name}.".startswith(f"{self.path}.")

    def to_json(self) -> dict[str, Any]:
        """Return the bypass as plain JSON."""
        return {"path": self.path, "reader": self.reader, "outputs": self.outputs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Bypass":
        """Undo `to_json`; TypeError if ``value`` is not such JSON."""
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoupledSet:
    """Units with one common decision: how many of them to keep.

    Attributes:
        name: unique name.
        axes: positions of the units in all tensors.
        work: share of one unit in the activation products of the whole network (for an attention head).
        mixed: name of a weight that mixes the positions of the units' values → share of one unit in its products.
        bypasses: modules that compute nothing once all units are removed; empty if one unit must stay.
    """

    name: str
    axes: tuple[Axis, ...]
    work: float = 0.0
    mixed: Mapping[str, float] = field(default_factory=dict)
    bypasses: tuple[Bypass, ...] = ()

    @property
    def num_units(self) -> int:
        """Number of units."""
        return len(self.axes[0].indices)

    def to_json(self) -> dict[str, Any]:
        """Return the set as plain JSON."""
        return {
            "name": self.name,
            "axes": [axis.to_json() for axis in self.axes],
            "work": self.work,
            "mixed": dict(self.mixed),
            "bypasses": [item.to_json() for item in self.bypasses],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CoupledSet":
        """Undo `to_json`; KeyError or TypeError if ``value`` is not such JSON."""
        bypasses = tuple(map(Bypass.from_json, value["bypasses"]))
        return cls(**{**value, "axes": tuple(map(Axis.from_json, value["axes"])), "bypasses": bypasses})
