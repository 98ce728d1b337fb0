"""A transform is one way to store a layer's weight in fewer bytes, as a frozen, JSON-able value.

It answers three questions about a weight: what does it become (`approximate`), what does that take (`size_bytes`,
`macs`), and which arrays are written to disk (`encode`, `decode`). What always holds: ``decode(encode(w))`` equals
``approximate(w)`` bit for bit, and the arrays of ``encode`` take exactly ``size_bytes``.

A weight is seen as rows ``(channels, weights per channel)`` (see `qcompress.layers`), possibly a block of them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a transform is asked to store: a weight's rows, without the numbers.

    Attributes:
        layer: type of the layer, as ``"Linear"`` or ``"Conv2d"``.
        channels, per_channel: shape of the rows.
        dtype: of the weight.
        macs: multiply-accumulates per sample through these rows, dense.
        whole: whether the rows are all of the layer's.
        replaceable: whether the layer can be swapped for others (it is called as a module, is not grouped and its
            weight is not shared with another module).
    """

    layer: str
    channels: int
    per_channel: int
    dtype: torch.dtype
    macs: float
    whole: bool = True
    replaceable: bool = True

    @property
    def num_weights(self) -> int:
        """Weights in the rows."""
        return self.channels * self.per_channel


@dataclass(frozen=True)
class Transform(ABC):
    """One way to store a weight. Subclasses are frozen dataclasses whose fields are plain JSON values."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, unique among the options of a group, as ``"4 bits, 50 % sparse"``."""

    @abstractmethod
    def why_not(self, target: Target) -> str:
        """Why the transform does not fit or saves nothing there, or an empty string."""

    @abstractmethod
    def size_bytes(self, target: Target) -> int:
        """Bytes of everything that is written: codes, scales, masks."""

    def macs(self, target: Target) -> float:
        """Multiply-accumulates per sample afterwards."""
        return target.macs

    @abstractmethod
    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """The arrays to write for ``rows`` (any float dtype, any strides), by a short name each."""

    @abstractmethod
    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """The rows again, ``(channels, per_channel)`` in the target's dtype."""

    def factors(self, stored: dict[str, Tensor], target: Target) -> tuple[Tensor, ...]:  # noqa: ARG002
        """Weights of the smaller layers that take the layer's place, or () when it stays and its weight changes."""
        return ()

    def approximate(self, rows: Tensor, target: Target) -> Tensor:
        """What the rows become, in their dtype."""
        return self.decode(self.encode(rows), target)

    def to_json(self) -> dict[str, Any]:
        """The transform as plain JSON, with its kind."""
        return {"kind": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True)
class Keep(Transform):
    """Leave the weight as it is."""

    kind: ClassVar[str] = "keep"

    @property
    def label(self) -> str:
        """The option's name."""
        return "keep"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """It always fits."""
        return ""

    def size_bytes(self, target: Target) -> int:
        """The dense weight in its own dtype."""
        return target.num_weights * target.dtype.itemsize

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows themselves."""
        return {"rows": rows.detach().contiguous().clone()}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:  # noqa: ARG002
        """The rows themselves."""
        return stored["rows"]
