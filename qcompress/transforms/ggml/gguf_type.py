"""A weight in one of ggml's block formats, as llama.cpp runs it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Target, Transform, Weight
from qcompress.transforms.ggml.types import LARGEST, TYPES

LAYERS = ("Linear", "Embedding")


@dataclass(frozen=True)
class GgufType(Transform):
    """Rows in blocks of one of ggml's types, encoded by ggml itself.

    Where the inputs' mean squares are known, columns count by them, as with llama.cpp's importance matrix. Rows that
    are no multiple of the type's block get the type that llama.cpp falls back to.

    >>> target = Target(layer="Linear", channels=2, per_channel=256, dtype=torch.float32, macs=512)
    >>> GgufType("Q4_K").size_bytes(target)  # a block of 256 weights takes 144 bytes
    288
    >>> narrow = Target(layer="Linear", channels=2, per_channel=96, dtype=torch.float32, macs=192)
    >>> GgufType("Q4_K").resolve(Weight(torch.ones(2, 96), narrow))
    GgufType(type='Q5_0')
    """

    kind: ClassVar[str] = "gguf"

    type: str

    def __post_init__(self) -> None:
        if self.type not in TYPES or self.type == "F32":
            known = ", ".join(name for name in TYPES if name != "F32")
            raise OptionsError(f"no type of ggml is called {self.type!r}; on offer are: {known}")

    @property
    def label(self) -> str:
        """The type's name."""
        return self.type

    def fitting(self, target: Target) -> "GgufType":
        """Itself, or what llama.cpp falls back to where rows are no multiple of the block."""
        kind = TYPES[self.type]
        return GgufType(kind.fallback) if target.per_channel % kind.block and kind.fallback else self

    def needs_squares(self, target: Target) -> bool:
        """Where its encoder takes them into account."""
        fitting = self.fitting(target)
        return TYPES[fitting.type].weighted and not fitting.why_not(target)

    def resolve(self, weight: Weight) -> "GgufType | None":
        """Itself or what llama.cpp falls back to, where it fits and saves anything."""
        fitting = self.fitting(weight.target)
        if fitting.why_not(weight.target) or (weight.squares is None and not TYPES[fitting.type].blind):
            return None
        largest = weight.once("largest", lambda: float(weight.rows.detach().abs().amax()))
        return fitting if largest <= LARGEST else None

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
        """
        from qcompress.transforms.ggml import library  # here: loads ggml

        rows = weight.once("float32", lambda: weight.rows.detach().cpu().float().contiguous().numpy())
        squares = None if weight.squares is None else weight.squares.cpu().numpy()
        return {"blocks": torch.from_numpy(library.encode(self.type, rows, squares))}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """What ggml decodes the blocks to."""
        from qcompress.transforms.ggml import library

        rows = library.decode(self.type, stored["blocks"].numpy(), target.per_channel)
        return torch.from_numpy(rows).to(target.dtype)
