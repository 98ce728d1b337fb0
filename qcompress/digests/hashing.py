"""A SHA-256 of words, with a memo of values that were met before and of the memory of a model's weights.

Functions named ``of_…`` of this package put what they know of a value into a `Digest`, and yield the values that it is
made of, each with its name; `qcompress.digests.walk` adds these one after the other.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Parts: TypeAlias = Iterator[tuple[Any, str]]
"""Values that are still to be added, each with its name in `Digest.unchecked`."""

OF_LIBRARIES = ("_qcompress", "_output_capturing_", "_torchdynamo_", "_is_hf_initialized")
"""Prefixes of the attributes that libraries set in modules, tensors, functions and classes of others."""

_DYNAMO = {"_dynamo_weak_dynamic_indices", "_dynamo_dynamic_indices", "_dynamo_static_input_type", "_dynamo_marks"}
_HUGGING_FACE = {"_hf_hook", "_hf_peft_config_loaded", "_hf_quantized_needs_local_tp"}
_NAMES_OF_LIBRARIES = _DYNAMO | _HUGGING_FACE
"""Names of such attributes."""


class Digest:
    """A SHA-256 that values are added to.

    Attributes:
        unchecked: values that are identified by their type alone, in the order in which they were met.
    """

    def __init__(self) -> None:
        self.unchecked: dict[str, None] = {}
        self._sha = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # id → order of arrival; holding the value keeps its id valid
        self._arrived = 0
        self._held: dict[int, tuple[int, Any]] = {}  # the same for memory

    def hexdigest(self) -> str:
        """Return the digest of everything added so far."""
        return self._sha.hexdigest()

    def put(self, *words: Any) -> None:
        """Add words, by their texts."""
        text = repr(words).encode()
        self._sha.update(len(text).to_bytes(8, "big") + text)

    def update(self, contents: Any) -> None:
        """Add bytes, whose number was put before."""
        self._sha.update(contents)

    def is_new(self, value: Any) -> bool:
        """Remember a value, and return whether it is met for the first time."""
        if id(value) in self._seen:
            return False
        self._seen[id(value)] = (self._arrived, value)
        self._arrived += 1
        return True

    def order_of(self, value: Any) -> int | None:
        """Return how many values had been met before this one, or None if it is new."""
        return self._seen[id(value)][0] if id(value) in self._seen else None

    def forget(self) -> None:
        """Release the values met so far, except classes, which are read once."""
        self._seen = {key: item for key, item in self._seen.items() if isinstance(item[1], type)}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Identify what shares memory with these tensors by its place in them; their values are added elsewhere."""
        for tensor in tensors:
            if (memory := memory_of(tensor)) is not None:
                self._held.setdefault(memory._cdata, (len(self._held), memory))

    def place_of(self, tensor: Tensor) -> int | None:
        """Return the order of the held memory that a tensor lies in, or None if it lies elsewhere."""
        memory = memory_of(tensor)
        return self._held[memory._cdata][0] if memory is not None and memory._cdata in self._held else None

    def cannot_check(self, value: Any, name: str) -> None:
        """Name a value that is identified by its type alone."""
        self.unchecked[f"{name}: {type(value).__name__}"] = None


def of_items(digest: Digest, kind: str, items: Iterable[Any], name: str) -> Parts:
    """Yield values in their order, all with one name."""
    listed = list(items)
    digest.put(kind, len(listed))
    for item in listed:
        yield item, name


def of_named(digest: Digest, items: Mapping[Any, Any], name: str) -> Parts:
    """Yield attributes in the order of their names, except what libraries keep there."""
    kept = {key: item for key, item in items.items() if type(key) is str and not is_of_library(key)}
    digest.put("named", len(kept))
    for key, item in sorted(kept.items()):
        digest.put(key)
        yield item, f"{name}.{key}"


def is_of_library(name: str) -> bool:
    """Whether an attribute is one that a library sets in objects of others."""
    return name.startswith(OF_LIBRARIES) or name in _NAMES_OF_LIBRARIES


def memory_of(tensor: Tensor) -> Any:
    """Return what holds the values of a dense tensor, or None if it has no memory of its own."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor of another library
        return None
