"""The GGUF file format: a header of named values and tensor descriptions, then the tensors, aligned to 32 bytes.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. The tests read these files
back with the package ``gguf``.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qcompress.errors import EngineError

ALIGNMENT: Final = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
_PACKED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?", 10: "<Q", 11: "<q",
           12: "<d"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A value of the header with its type in the file; for an array also the type of its items."""

    content: Any
    kind: int
    item_kind: int | None = None

    @classmethod
    def of(cls, content: Any) -> "Value":
        """Convert a plain Python object: integers become unsigned, floats have 32 bits.

        >>> Value.of([1.5, 2.0])
        Value(content=[1.5, 2.0], kind=9, item_kind=6)
        """
        if isinstance(content, (list, tuple)):
            items = list(content)
            return cls(content=items, kind=ARRAY, item_kind=cls.of(items[0]).kind if items else UINT32)
        kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING}
        return cls(content=content, kind=kinds[type(content)])

    def packed(self) -> bytes:
        """Return the bytes of the value in the file, type first."""
        if self.kind != ARRAY:
            return struct.pack("<I", self.kind) + _packed(self.content, self.kind)
        assert self.item_kind is not None  # noqa: S101
        items = b"".join(_packed(item, self.item_kind) for item in self.content)
        return struct.pack("<IIQ", ARRAY, self.item_kind, len(self.content)) + items


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """A tensor of the file, whose content is requested when it is written.

    Attributes:
        name: name in the file.
        shape: shape in weights, outermost dimension first.
        number: number of its ggml type.
        size_bytes: bytes of its content.
        content: function that returns the content, of any shape and dtype.
    """

    name: str
    shape: tuple[int, ...]
    number: int
    size_bytes: int
    content: Callable[[], NDArray[Any]]


def header_bytes(values: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> bytes:
    """Return everything before the tensors, padding included; its length does not depend on the tensors' types."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))]
    parts += [_string(name) + value.packed() for name, value in values.items()]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions,
                                                        tensor.number, offset))  # fmt: skip
        offset += padded(tensor.size_bytes)
    whole = b"".join(parts)
    return whole.ljust(padded(len(whole)), b"\0")


def write(path: Path, values: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> None:
    """Write a file, one tensor at a time.

    Raises:
        EngineError: the content of a tensor does not have the planned size.
    """
    with path.open("wb") as file:
        file.write(header_bytes(values, tensors))
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.content())
            if content.nbytes != tensor.size_bytes:
                raise EngineError(f"tensor {tensor.name!r} takes {content.nbytes} bytes, planned {tensor.size_bytes}")
            file.write(content.reshape(-1).view(np.uint8).data)
            file.write(b"\0" * (padded(content.nbytes) - content.nbytes))


def opened(path: Path) -> Any:
    """Return a ``gguf.GGUFReader`` of a file.

    Raises:
        EngineError: it is not a GGUF file, or is cut off.
    """
    import gguf

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise EngineError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise EngineError(
            f"{path} is cut off or damaged: its {path.stat().st_size} bytes are not all that its header announces "
            f"({error})"
        ) from error


def why_not_whole(reader: Any) -> str:
    """Return why the file of a ``gguf.GGUFReader`` is not a whole model, or an empty string."""
    keys = ("general.type", "split.no", "split.count")
    metadata = {name: reader.fields[name].contents() for name in keys if name in reader.fields}
    if metadata.get("general.type") == "adapter":
        return "is an adapter (LoRA), no model: merge it into its model, as llama-export-lora does, and give that file"
    if (count := metadata.get("split.count", 1)) > 1:
        return (
            f"is part {metadata.get('split.no', 0) + 1} of {count} of a model: merge them, as "
            "'llama-gguf-split --merge FIRST_PART WHOLE' does, and give the whole file"
        )
    names = {tensor.name for tensor in reader.tensors}
    if not names:
        return "holds only a vocabulary and no weights: give the file with the model's weights"
    return "" if "token_embd.weight" in names else "lacks 'token_embd.weight', so it is not a language model or encoder"


def padded(size_bytes: int) -> int:
    """Round up to the position where the next tensor begins.

    >>> padded(33)
    64
    """
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _packed(content: Any, kind: int) -> bytes:
    return _string(content) if kind == STRING else struct.pack(_PACKED[kind], content)


def _string(text: str | bytes) -> bytes:
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded
