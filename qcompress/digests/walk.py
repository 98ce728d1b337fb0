"""The walk through values of any kind: each part is added before the next one, on a list instead of the call stack."""

import copyreg
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qcompress.digests.code import PLAIN, of_class, of_code, of_function, of_module
from qcompress.digests.hashing import Digest, Parts, of_items, of_named
from qcompress.digests.libraries import contents_of, is_library, is_library_module, module_of
from qcompress.digests.models import LABELS, of_model
from qcompress.digests.tensors import of_array, of_tensor

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
            digest.put(type(found[0]).__name__, found[0])
        else:
            waiting.append(_parts(digest, *found))


def _parts(digest: Digest, value: Any, name: str) -> Parts:
    if isinstance(value, Tensor):
        return of_tensor(digest, value, name)
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return of_array(digest, value, name)
    if not digest.is_new(value):
        digest.put("seen", digest.order_of(value))
        return iter(())
    if type(value) is dict:
        return _of_mapping(digest, value, name)
    if type(value) in (list, tuple):
        return of_items(digest, type(value).__name__, value, name)
    if isinstance(value, (set, frozenset)):
        return _of_set(digest, value, name)
    for kind, of_kind in _OF_KINDS.items():
        if isinstance(value, kind):
            return of_kind(digest, value, name)
    return _of_object(digest, value, name)


def _of_mapping(digest: Digest, value: Mapping[Any, Any], name: str) -> Parts:
    yield from of_items(digest, "mapping", (), name)
    for key, item in value.items():  # in its order, which a forward pass may follow
        yield key, name
        yield item, f"{name}.{key}"
    digest.put("end of", len(value))


def _of_set(digest: Digest, value: set[Any] | frozenset[Any], name: str) -> Parts:
    """Yield the items in the order of their labels; those that have one label cannot be told apart, and are named.

    Their own order differs between processes.
    """
    yield type(value), name
    labelled: dict[str, list[Any]] = {}
    for item in value:
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
        return f"{type(value).__name__} {value!r}"
    if (order := digest.order_of(value)) is not None:
        return f"seen {order}"
    if type(value) in (tuple, frozenset):
        labels = [_label(digest, item) for item in value]
        return repr(sorted(labels) if isinstance(value, frozenset) else labels)
    if isinstance(value, Tensor) and (place := digest.place_of(value)) is not None:
        return f"held {place} {value.storage_offset()}"
    if isinstance(value, Enum):
        return f"{type(value).__qualname__} {value._name_}"
    named = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
    return f"{type(value).__name__} {named.__module__}.{named.__qualname__}"


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
        if isinstance(value, Mapping) and is_library(kind):  # a read-only view
            yield from _of_mapping(digest, value, name)
        else:
            digest.cannot_check(value, name)
        return
    if isinstance(reduced, str):
        if not _is_found(value, reduced):
            digest.cannot_check(value, name)
        digest.put("named", reduced)
        return
    made, args, *state = reduced
    yield from of_items(digest, "made from", [made, *(item for item in args if item is not kind)], name)
    if state and isinstance(state[0], dict):
        labels = LABELS if "transformers_version" in state[0] else set()
        yield from of_named(digest, {key: item for key, item in state[0].items() if key not in labels}, name)
        state = state[1:]
    for extra in state:
        yield from of_items(digest, "state", extra if isinstance(extra, Iterable) else [extra], name)


def _is_found(value: Any, name: str) -> bool:
    """Whether the module of a value holds it by this name."""
    found: Any = sys.modules.get(module_of(value))
    for word in name.split("."):
        found = getattr(found, word, None)
    return found is value


_OF_KINDS: dict[type, Callable[[Digest, Any, str], Parts]] = {
    types.ModuleType: of_module,
    type: of_class,
    types.FunctionType: of_function,
    types.CodeType: of_code,
    types.BuiltinFunctionType: _of_builtin,
    types.MethodType: lambda digest, value, name: of_items(digest, "method", (value.__func__, value.__self__), name),
    weakref.ref: lambda digest, value, name: of_items(digest, "reference", [value()], name),
    weakref.WeakKeyDictionary: lambda digest, _, name: of_items(digest, "cache", (), name),  # of functools
    RemovableHandle: lambda digest, _, name: of_items(digest, "handle", (), name),  # hooks count, not their numbers
    nn.Module: of_model,
    Enum: _of_member,
}
"""Kind of value → how it is added, in the order in which they are tried."""
