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
    """Rows in blocks of one of ggml's types, encoded by ggml itself.

    Where the inputs' mean squares are known, columns count by them, as with llama.cpp's importance matrix. Rows that
    are no multiple of the type's block get the type that llama.cpp falls back to. Compensated, codes,
    scales and offsets are chosen on the second moments of the layer's inputs, in the same bytes
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
            raise OptionsError(f"no type of ggml is called {self.type!r}; known: {known}")
        if not isinstance(self.compensated, bool):
            raise OptionsError(f"compensated must be True or False, found {self.compensated!r}")

    @property
    def label(self) -> str:
        """As ``"Q4_K"`` or ``"Q4_K, compensated"``."""
        return f"{self.type}, compensated" if self.compensated else self.type

    @property
    def nearest(self) -> "GgufType":
        """The same as ggml encodes it."""
        return replace(self, compensated=False)

    @property
    def uncalibrated(self) -> "GgufType":
        """The same without the moments of the layer's input."""
        return self.nearest

    def to_json(self) -> dict[str, Any]:
        """As of any offer; without the word where ggml's codes stay."""
        value = super().to_json()
        return value if self.compensated else {name: field for name, field in value.items() if name != "compensated"}

    def needs_moments(self, target: Target) -> bool:
        """When compensated, where the rows have one input and the codes are no lattice."""
        inputs_known = target.common_input or target.head
        return self.compensated and inputs_known and self.fitting(target).type in COMPENSATED

    def fitting(self, target: Target) -> "GgufType":
        """Itself, or what llama.cpp falls back to where rows are no multiple of the block."""
        kind = TYPES[self.type]
        return replace(self, type=kind.fallback) if target.per_channel % kind.block and kind.fallback else self

    def needs_squares(self, target: Target) -> bool:
        """Where its encoder takes them into account."""
        fitting = self.fitting(target)
        return TYPES[fitting.type].weighted and not fitting.why_not(target)

    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Of what llama.cpp makes of it there."""
        fitting = self.fitting(target)
        return None if fitting.why_not(target) else (fitting.size_bytes(target), fitting.macs(target))

    def resolve(self, weight: Weight) -> "GgufType | None":
        """Itself or what llama.cpp falls back to, where it fits and saves anything."""
        fitting = self.fitting(weight.target)
        if fitting.why_not(weight.target) or (weight.squares is None and not TYPES[fitting.type].blind):
            return None
        largest = weight.once("largest", lambda: float(weight.rows.detach().abs().amax()))
        if largest > LARGEST:
            return None
        return fitting if fitting.needs_moments(weight.target) else fitting.nearest

    def why_not(self, target: Target) -> str:
        """It fits dense layers and vocabularies with rows of a multiple of the block."""
        kind = TYPES[self.type]
        if target.layer not in LAYERS:
            return f"{self.type} is for {' and '.join(LAYERS)} layers, not {target.layer}"
        if target.per_channel % kind.block:
            return f"{self.type} takes rows of a multiple of {kind.block} weights, these have {target.per_channel}"
        size_bytes = self.size_bytes(target)
        dense = target.dense_bytes
        return f"takes {size_bytes} bytes, the weight itself {dense}" if size_bytes >= dense else ""

    def size_bytes(self, target: Target) -> int:
        """Blocks of all rows."""
        return target.channels * TYPES[self.type].row_bytes(target.per_channel)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """``blocks`` ``(channels, bytes of a row)`` uint8.

        Raises:
            MissingError: ggml's library is missing.
            ModelError: a weight is not finite or beyond float16, or rows that do not fit.
            OptionsError: compensated, and the moments are missing.
        """
        from qcompress.transforms.ggml import library  # here: loads ggml

        rows = weight.once("float32", lambda: weight.rows.detach().cpu().float().contiguous().numpy())
        squares = None if weight.squares is None else weight.squares.cpu().numpy()
        blocks = library.encode(self.type, rows, squares)
        return {"blocks": torch.from_numpy(self._made_up(weight, rows, blocks) if self.compensated else blocks)}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """What ggml decodes the blocks to."""
        from qcompress.transforms.ggml import library

        rows = library.decode(self.type, stored["blocks"].numpy(), target.per_channel)
        return torch.from_numpy(rows).to(target.dtype)

    def _made_up(self, weight: Weight, rows: NDArray[np.float32], blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Blocks whose codes make up for each other's errors."""
        from qcompress.transforms.ggml.compensation import compensated  # here: numba is slow to import
        from qcompress.transforms.quantize.compensation import in_order, shrunk

        if weight.moments is None or weight.moments.ndim != 2:
            raise OptionsError(moments_missing(self.label))
        moments = weight.moments
        curvature = weight.once_of_inputs("curvature", lambda: shrunk(moments, weight.num_inputs))
        if not bool(curvature.any()):  # it never sees anything: nothing is lost either way
            return blocks
        ordered = weight.once_of_inputs("ordered", lambda: in_order(curvature))
        return compensated(self.type, rows, blocks, curvature, ordered)
