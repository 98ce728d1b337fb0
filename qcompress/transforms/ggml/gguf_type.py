"""A weight in one of ggml's block formats, as llama.cpp runs it."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Target, Transform, Weight, moments_missing
from qcompress.transforms.ggml.types import COMPENSATED, LARGEST, TYPES

LAYERS = ("Linear", "Embedding")


@dataclass(frozen=True)
class GgufType(Transform):
    """Store rows in blocks of one of ggml's types, encoded by ggml itself.

    Where the mean squares of the inputs are known, columns are weighted by them, as with llama.cpp's importance matrix.
    Rows whose length is not a multiple of the type's block get the type that llama.cpp falls back to. If compensated,
    codes, scales and offsets are chosen with the second moments of the layer's inputs, in the same bytes
    (`qcompress.transforms.ggml.compensation`).

    >>> target = Target(layer="Linear", channels=2, per_channel=256, dtype=torch.float32, macs=512)
    >>> GgufType("Q4_K").size_bytes(target)  # a block of 256 weights takes 144 bytes
    288
    >>> narrow = Target(layer="Linear", channels=2, per_channel=96, dtype=torch.float32, macs=192)
    >>> GgufType("Q4_K").resolve(Weight(torch.ones(2, 96), narrow))
    GgufType(type='Q5_0', compensated=False)
    """

    kind: ClassVar[str] = "gguf"

    type: str
    compensated: bool = False

    def __post_init__(self) -> None:
        if self.type not in TYPES or self.type == "F32":
            known = ", ".join(name for name in TYPES if name != "F32")
            raise OptionsError(f"ggml has no type called {self.type!r}; known: {known}")
        if not isinstance(self.compensated, bool):
            raise OptionsError(f"compensated must be True or False, found {self.compensated!r}")

    @property
    def label(self) -> str:
        """Short name, such as ``"Q4_K"`` or ``"Q4_K, compensated"``."""
        return f"{self.type}, compensated" if self.compensated else self.type

    @property
    def nearest(self) -> "GgufType":
        """The same type with ggml's own codes."""
        return replace(self, compensated=False)

    @property
    def uncalibrated(self) -> "GgufType":
        """The same type without the second moments of the layer's input."""
        return self.nearest

    def to_json(self) -> dict[str, Any]:
        """Return the transform as JSON; ``compensated`` is left out when False."""
        value = super().to_json()
        return value if self.compensated else {name: field for name, field in value.items() if name != "compensated"}

    def needs_moments(self, target: Target) -> bool:
        """Whether it is compensated, the rows have a common input, and the type's codes can be chosen here."""
        inputs_known = target.common_input or target.head
        return self.compensated and inputs_known and self.fitting(target).type in COMPENSATED

    def fitting(self, target: Target) -> "GgufType":
        """Return itself, or llama.cpp's fallback type where rows are not a multiple of the block."""
        kind = TYPES[self.type]
        return replace(self, type=kind.fallback) if target.per_channel % kind.block and kind.fallback else self

    def needs_squares(self, target: Target) -> bool:
        """Whether the type fits and its encoder uses them."""
        fitting = self.fitting(target)
        return TYPES[fitting.type].weighted and not fitting.why_not(target)

    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Return the bytes and macs of the type that llama.cpp uses there."""
        fitting = self.fitting(target)
        return None if fitting.why_not(target) else (fitting.size_bytes(target), fitting.macs(target))

    def resolve(self, weight: Weight) -> "GgufType | None":
        """Return itself or llama.cpp's fallback type, where it fits and saves bytes."""
        fitting = self.fitting(weight.target)
        if fitting.why_not(weight.target) or (weight.squares is None and not TYPES[fitting.type].blind):
            return None
        largest = weight.once("largest", lambda: float(weight.rows.detach().abs().amax()))
        if largest > LARGEST:
            return None
        return fitting if fitting.needs_moments(weight.target) else fitting.nearest

    def why_not(self, target: Target) -> str:
        """It fits Linear and Embedding layers whose rows are a multiple of the block."""
        kind = TYPES[self.type]
        if target.layer not in LAYERS:
            return f"{self.type} is for {' and '.join(LAYERS)} layers, not {target.layer}"
        if target.per_channel % kind.block:
            return f"{self.type} takes rows of a multiple of {kind.block} weights, these have {target.per_channel}"
        size_bytes = self.size_bytes(target)
        dense = target.dense_bytes
        return f"takes {size_bytes} bytes, the weight itself {dense}" if size_bytes >= dense else ""

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of the blocks of all rows."""
        return target.channels * TYPES[self.type].row_bytes(target.per_channel)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return ``blocks`` ``(channels, bytes of a row)`` uint8.

        Raises:
            MissingError: ggml's library is missing.
            ModelError: a weight is not finite or exceeds float16, or the rows do not fit.
            OptionsError: the transform is compensated and the moments are missing.
        """
        from qcompress.transforms.ggml import library  # here: loads ggml

        rows = weight.once("float32", lambda: weight.rows.detach().cpu().float().contiguous().numpy())
        squares = None if weight.squares is None else weight.squares.cpu().numpy()
        blocks = library.encode(self.type, rows, squares)
        return {"blocks": torch.from_numpy(self._compensate(weight, rows, blocks) if self.compensated else blocks)}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Return the rows that ggml decodes the blocks to."""
        from qcompress.transforms.ggml import library

        rows = library.decode(self.type, stored["blocks"].numpy(), target.per_channel)
        return torch.from_numpy(rows).to(target.dtype)

    def _compensate(self, weight: Weight, rows: NDArray[np.float32], blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Blocks whose codes compensate for each other's errors."""
        from qcompress.transforms.ggml.compensation import compensated_blocks  # here: numba is slow to import
        from qcompress.transforms.quantize.compensation import inverse_factor, shrunk

        if weight.moments is None or weight.moments.ndim != 2:
            raise OptionsError(moments_missing(self.label))
        moments = weight.moments
        curvature = weight.once_of_inputs("curvature", lambda: shrunk(moments, weight.num_inputs))
        if not bool(curvature.any()):  # all inputs are zero: nothing is lost either way
            return blocks
        ordered = weight.once_of_inputs("ordered", lambda: inverse_factor(curvature))
        return compensated_blocks(self.type, rows, blocks, curvature, ordered)
