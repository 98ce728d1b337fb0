"""The walk through values of any kind: each part is added before the next one, on a list instead of the call stack."""

import copyreg
import hashlib
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.hooks import RemovableHandle

from qcompress.digests.code import PLAIN, of_class, of_code, of_function, of_module
from qcompress.digests.hashing import Digest, Parts, of_items, of_named
from qcompress.digests.libraries import contents_of, is_library, is_library_module, module_of
from qcompress.digests.models import LABELS, of_model
from qcompress.digests.tensors import of_array, of_tensor

_VALUES = (
    np.generic,
    PurePath,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    OpOverload,
    OpOverloadPacket,
)
"""Kinds of values that are known by their text, where their class is a library's."""

_OF_MEMBERS = {"_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_"}
"""Attributes that Python sets in members of enumerations."""


def add(digest: Digest, parts: Iterable[tuple[Any, str]]) -> None:
    """Add values, each with its parts; a repeated value is identified by its order of arrival, so cycles end."""
    waiting = [iter(parts)]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
        elif type(found[0]) in PLAIN:
            digest.put(type(found[0]).__name__, _text(found[0]))
        else:
            waiting.append(_parts(digest, *found))


def _parts(digest: Digest, value: Any, name: str) -> Parts:
    kind = type(value)  # not what `isinstance` asks, as any class may answer that it is another
    if issubclass(kind, _VALUES) and is_library(kind):
        return of_items(digest, "value", (kind, repr(value)), name)
    if issubclass(kind, Tensor):
        return of_tensor(digest, value, name)
    if issubclass(kind, np.ndarray) and not issubclass(kind, np.ma.MaskedArray):
        return of_array(digest, value, name)
    if not digest.is_new(value):
        digest.put("seen", digest.order_of(value))
        return iter(())
    if kind is dict:
        return _of_mapping(digest, value, name)
    if kind in (list, tuple):
        return of_items(digest, kind.__name__, value, name)
    return next((of for base, of in _OF_KINDS.items() if issubclass(kind, base)), _of_object)(digest, value, name)


def _of_mapping(digest: Digest, value: Mapping[Any, Any], name: str) -> Parts:
    digest.put("mapping")
    for key, item in value.items():  # in its order, which a forward pass may follow
        yield key, name
        yield item, f"{name}.{key}" if type(key) in PLAIN else name
    digest.put("end of", len(value))


def _of_set(digest: Digest, value: set[Any] | frozenset[Any], name: str) -> Parts:
    """Yield the items in the order of their labels; those that have one label cannot be told apart, and are named.

    Their own order differs between processes.
    """
    yield type(value), name
    labelled: dict[str, list[Any]] = {}
    base: Any = set if issubclass(type(value), set) else frozenset
    for item in base.__iter__(value):
        labelled.setdefault(_label(digest, item), []).append(item)
    digest.put("set", sorted((label, len(items)) for label, items in labelled.items()))
    for _, (first, *others) in sorted(labelled.items()):
        if not others:
            yield first, name
        else:
            digest.cannot_check(first, name)
    yield from of_named(digest, getattr(value, "__dict__", {}), name)


def _label(digest: Digest, value: Any) -> str:
    """Return what is known of an item without looking into it, the same in every process."""
    if type(value) in PLAIN:
        return f"{type(value).__name__} {_text(value)}"
    if (order := digest.order_of(value)) is not None:
        return f"seen {order}"
    kind = type(value)
    if issubclass(kind, (tuple, frozenset)):
        base: Any = tuple if issubclass(kind, tuple) else frozenset
        labels = [_label(digest, item) for item in base.__iter__(value)]
        text = repr(sorted(labels) if base is frozenset else labels)
        return f"{kind.__qualname__} {hashlib.sha256(text.encode()).hexdigest()}"
    if issubclass(kind, Tensor) and (place := digest.place_of(value)) is not None:
        return f"held {place} {value.storage_offset()}"
    if issubclass(kind, _VALUES) and is_library(kind):
        return f"{kind.__qualname__} {value!r}"
    if issubclass(kind, Enum):
        return f"{kind.__qualname__} {value._name_}"
    named = value if issubclass(kind, (type, types.FunctionType, types.BuiltinFunctionType)) else kind
    return f"{kind.__name__} {module_of(named)}.{named.__qualname__}"


def _text(value: Any) -> str:
    """Return the text of a plain value; of whole numbers in a form without a limit to their length."""
    return hex(value) if type(value) is int else repr(value)


def _of_builtin(digest: Digest, value: types.BuiltinFunctionType, name: str) -> Parts:
    """Put a function of compiled code by its name, and yield the object that it is a method of."""
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        module = value.__module__ or ""
        own = not is_library_module(sys.modules.get(module), module)
        digest.put("compiled", module, value.__qualname__, contents_of(module) if own else "")
    else:
        digest.put("compiled", value.__name__)
        yield owner, name


def _of_member(digest: Digest, value: Enum, name: str) -> Parts:
    digest.put("member", str(value._name_))
    yield type(value), name
    yield value._value_, name
    yield from of_named(digest, {key: item for key, item in vars(value).items() if key not in _OF_MEMBERS}, name)


def _of_object(digest: Digest, value: Any, name: str) -> Parts:
    """Yield the class and the state that `copy` and `pickle` would store of any other object."""
    kind = type(value)
    wrapped = inspect.getattr_static(value, "__wrapped__", None)
    if wrapped is not None and is_library(kind):  # a decorator's object, with caches and counters of its own
        yield from of_items(digest, "wrapped", (kind, wrapped), name)
        return
    yield kind, name
    try:
        reducer = copyreg.dispatch_table.get(kind)  # of compiled regular expressions, for example
        reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
    except Exception:  # any class may refuse to be copied with any exception
        reduced = None
    if type(reduced) is str and _is_found(value, reduced):
        digest.put("named", reduced)
    elif type(reduced) is tuple and len(reduced) > 1 and type(reduced[1]) is tuple:
        yield from _of_reduced(digest, kind, reduced, name)
    elif issubclass(kind, Mapping) and is_library(kind):  # a read-only view
        yield from _of_mapping(digest, value, name)
    else:
        digest.cannot_check(value, name)


def _of_reduced(digest: Digest, kind: type, reduced: tuple[Any, ...], name: str) -> Parts:
    """Yield what an object is made from, its state, and its items if it is a container."""
    made, args, *state = reduced
    yield from of_items(digest, "made from", [made, *(item for item in args if item is not kind)], name)
    if state and type(state[0]) is dict and all(type(key) is str for key in state[0]):
        labels = LABELS if "transformers_version" in state[0] else set()
        yield from of_named(digest, {key: item for key, item in state[0].items() if key not in labels}, name)
        state = state[1:]
    for extra in state:
        yield from of_items(digest, "state", extra if issubclass(type(extra), Iterator) else [extra], name)


def _is_found(value: Any, name: str) -> bool:
    """Whether the module of a value holds it by this name."""
    found: Any = sys.modules.get(module_of(value))
    for word in name.split("."):
        found = getattr(found, word, None)
    return found is value


_OF_KINDS: dict[type, Callable[[Digest, Any, str], Parts]] = {
    set: _of_set,
    frozenset: _of_set,
    types.ModuleType: of_module,
    type: of_class,
    types.FunctionType: of_function,
    types.CodeType: of_code,
    types.BuiltinFunctionType: _of_builtin,
    types.MethodType: lambda digest, value, name: of_items(digest, "method", (value.__func__, value.__self__), name),
    weakref.ref: lambda digest, value, name: of_items(digest, "reference", [value()], name),
    weakref.WeakSet: lambda digest, value, name: of_items(digest, "weak set", [set(value)], name),
    RemovableHandle: lambda digest, _, name: of_items(digest, "handle", (), name),  # hooks count, not their numbers
    nn.Module: of_model,
    Enum: _of_member,
}
"""Kind of value → how it is added, in the order in which they are tried."""
