"""Safetensors files whose size is a sum over their tensors: the header reserves space for the largest offsets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from qcompress.model.tensors import bytes_of

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_START = '{"__metadata__":{"format":"pt"}'
_LARGEST_OFFSET = 10**15
OVERHEAD = 8 + 32  # the length of the header, then its start and end
assert len(_START) < OVERHEAD - 8  # noqa: S101


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorEntry:
    """A tensor of a file: its description in the header, and how to get it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes in a file, including its description in the header.

        >>> TensorEntry(name="fc.weight", dtype=torch.float32, shape=(2, 3)).size_bytes
        120
        """
        return self.nbytes + self.header_bytes

    @property
    def header_bytes(self) -> int:
        """Bytes reserved in the header, a multiple of 8."""
        return -(-len(self.described(_LARGEST_OFFSET, _LARGEST_OFFSET).encode()) // 8) * 8

    def described(self, start: int, stop: int) -> str:
        """Return the tensor's description for the header."""
        entry = {"dtype": DTYPES[self.dtype], "shape": list(self.shape), "data_offsets": [start, stop]}
        return f",{json.dumps(self.name)}:{json.dumps(entry, separators=(',', ':'))}"


def write(file: BinaryIO, entries: Sequence[TensorEntry]) -> None:
    """Write a file of ``OVERHEAD`` bytes and the ``size_bytes`` of its entries."""
    text, place = _START, 0
    for entry in entries:
        text += entry.described(place, place + entry.nbytes)
        place += entry.nbytes
    header = (text + "}").encode().ljust(OVERHEAD - 8 + sum(entry.header_bytes for entry in entries))
    file.write(len(header).to_bytes(8, "little"))
    file.write(header)
    for entry in entries:
        assert entry.tensor is not None  # noqa: S101
        tensor = entry.tensor()
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape)  # noqa: S101
        file.write(bytes_of(tensor))
