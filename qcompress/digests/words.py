"""What a digest is made of: the hash, a memo of what was met before, and values without parts that are added later.

Methods named ``_of_…`` put what is known of a value and yield its parts with their names; the walk adds them at once.
"""

import hashlib
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Parts: TypeAlias = Iterator[tuple[Any, str]]
"""Values that are still to be added, each with its name for `HashedWords.unchecked`."""


class HashedWords:
    """A SHA-256 of words, with a memo of values and of the memory of a model's parameters and buffers.

    Attributes:
        unchecked: items identified by their type alone.
    """

    def __init__(self) -> None:
        self.unchecked: dict[str, None] = {}
        self._sha = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # id → order of arrival; holding the value keeps its id valid
        self._held: dict[int, tuple[int, Any]] = {}  # the same for memory

    def hexdigest(self) -> str:
        """Return the digest of everything added so far."""
        return self._sha.hexdigest()

    def forget(self) -> None:
        """Release the values seen so far."""
        self._seen.clear()

    def leave_out(self, value: Any) -> None:
        """Do not inspect a value that others refer to."""
        self._is_new(value)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Identify what shares memory with these tensors by its place in them; their values are added elsewhere."""
        for tensor in tensors:
            if (memory := _memory_of(tensor)) is not None:
                self._held.setdefault(memory._cdata, (len(self._held), memory))

    def _is_new(self, value: Any) -> bool:
        """Note a value that may be met again."""
        return self._seen.setdefault(id(value), (order := len(self._seen), value))[0] == order

    def _is_held(self, tensor: Tensor) -> bool:
        return (memory := _memory_of(tensor)) is not None and memory._cdata in self._held

    def _put(self, *words: Any) -> None:
        text = repr(words).encode()
        self._sha.update(len(text).to_bytes(8, "big") + text)

    def _cannot_check(self, value: Any, name: str) -> None:
        self.unchecked[f"{name}: {type(value).__name__}"] = None

    def _of_items(self, kind: str, items: Iterable[Any], name: str) -> Parts:
        listed = list(items)
        self._put(kind, len(listed))
        for item in listed:
            yield item, name

    def _of_array(self, value: Any, name: str) -> Parts:
        if isinstance(value, Tensor) and self._is_held(value):
            order, _ = self._held[value.untyped_storage()._cdata]
            place = (tuple(value.shape), value.stride(), value.storage_offset())
            self._put("held", order, str(value.dtype), *place, value.is_conj(), value.is_neg())
        elif isinstance(value, Tensor):
            yield from self._of_tensor(value, name)
        elif value.dtype.hasobject:
            yield from self._of_items("objects", [str(value.dtype), value.shape, *value.ravel().tolist()], name)
        else:
            self._put("numpy array", str(value.dtype), value.shape)
            self._sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _of_tensor(self, value: Tensor, name: str) -> Parts:
        if value.is_nested:
            yield from self._of_items("nested tensor", value.unbind(), name)
        elif value.layout == torch.sparse_coo:
            whole = value.coalesce()
            yield from self._of_items("sparse tensor", (list(value.shape), whole.indices(), whole.values()), name)
        elif value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            self._put("tensor", str(value.dtype), tuple(value.shape))
            self._cannot_check(value, name)
        else:
            self._put("array", str(value.dtype).removeprefix("torch."), tuple(value.shape))
            flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            self._sha.update(flat.view(torch.uint8).numpy().data)


def plain_words(value: Any) -> tuple[str, str]:
    """Return type and text of a plain value, whatever text a user's own class gives."""
    kind = type(value)
    if isinstance(value, np.generic):
        dtype: Any = np.generic.dtype
        return kind.__name__, f"{dtype.__get__(value)} {np.generic.item(value)!r}"
    if isinstance(value, Enum):
        return kind.__qualname__, str(value._name_)
    if isinstance(value, PurePath):
        return kind.__name__, repr(PurePath.__str__(value))
    base: Any = next((base for base in (int, float, complex, str, bytes) if isinstance(value, base)), kind)
    return kind.__name__, repr(value) if kind is bool else base.__repr__(value)


def _memory_of(tensor: Tensor) -> Any:
    """Return what holds the values of a dense tensor, or None if it has no memory of its own."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor of another library
        return None
