"""The walk through values of any kind: each part is added before the next one, on a list instead of the call stack."""

import copyreg
import functools
import inspect
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qcompress.digests.models import ModelWords
from qcompress.digests.ownership import PYTHONS, is_own, is_plain, is_settings, items_of
from qcompress.digests.words import Parts, plain_words

_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class Digest(ModelWords):
    """A SHA-256 that accepts values of any kind."""

    def add(self, value: Any, name: str) -> None:
        """Add one value with its parts."""
        self.add_all([(value, name)])

    def add_all(self, parts: Iterable[tuple[Any, str]]) -> None:
        """Add values, each with its parts; a repeated value is identified by its order of arrival, so cycles end."""
        waiting = [iter(parts)]
        while waiting:
            found = next(waiting[-1], None)
            if found is None:
                waiting.pop()
            elif type(found[0]) in PYTHONS or (is_plain(found[0]) and not is_own(type(found[0]))):
                self._put(plain_words(found[0]))
            else:
                waiting.append(self._parts(*found))

    def _parts(self, value: Any, name: str) -> Parts:
        if isinstance(value, (np.ndarray, np.void, Tensor)):
            yield from self._of_array(value, name)
            yield from self._of_attached(value, name)
        elif self._is_new(value):
            yield from self._of_compound(value, name)
        else:
            self._put("seen", self._seen[id(value)][0])

    def _of_compound(self, value: Any, name: str) -> Parts:
        if is_plain(value):
            return self._of_own_plain(value, name)
        if isinstance(value, dict) or (isinstance(value, Mapping) and not is_own(type(value))):
            return self._of_mapping(value, name)
        if isinstance(value, (list, tuple)):
            return self._of_sequence(value, name)
        if isinstance(value, (set, frozenset)):
            return self._of_set(value, name)
        if isinstance(value, weakref.ref):
            return self._of_items("reference", [value()], name)
        if isinstance(value, types.ModuleType):
            return self._of_held_module(value, name)
        if isinstance(value, type):
            return self._of_class(value, name)
        if isinstance(value, types.FunctionType):
            return self._of_function(value, name)
        if isinstance(value, types.CodeType):
            return self._of_code(value, name)
        if isinstance(value, types.MethodType):
            return self._of_items("method", (value.__func__, value.__self__), name)
        if isinstance(value, nn.Module):
            return self._of_module(value, name)
        if isinstance(value, RemovableHandle):  # hooks count, not their numbers
            return self._of_items("handle", (), name)
        if is_settings(value):
            return self._of_settings(value, name)
        return self._of_object(value, name)

    def _of_mapping(self, value: Mapping[Any, Any], name: str) -> Parts:
        yield from self._of_kind(value, name)
        if isinstance(value, defaultdict):
            yield value.default_factory, name
        items = list(dict.items(value) if isinstance(value, dict) else value.items())
        if isinstance(value, OrderedDict):  # which has another order than the dictionary below it
            order = {id(key): place for place, key in enumerate(OrderedDict.__iter__(value))}
            items.sort(key=lambda item: order.get(id(item[0]), len(order)))  # one that was set past it is last
        self._put("mapping", len(items))
        for key, item in items:  # in its order, which a forward pass may follow
            yield key, name
            yield item, f"{name}.{key}"

    def _of_sequence(self, value: Any, name: str) -> Parts:
        yield from self._of_kind(value, name)
        base = list if isinstance(value, list) else tuple
        yield from self._of_items("sequence", base.__iter__(value), name)

    def _of_own_plain(self, value: Any, name: str) -> Parts:
        """Yield what a plain value of a user's own class holds; members of enumerations have an inner value."""
        self._put(plain_words(value))
        if isinstance(value, Enum):
            yield value._value_, name
        yield from self._of_kind(value, name)

    def _of_set(self, value: Any, name: str) -> Parts:
        """Yield the items in the order of their labels; those that have one label cannot be told apart, and are named.

        Their own order differs between processes.
        """
        yield from self._of_kind(value, name)
        labelled: dict[str, list[Any]] = {}
        for item in (set if isinstance(value, set) else frozenset).__iter__(value):
            labelled.setdefault(self._label(item), []).append(item)
        self._put("set", sorted((label, len(items)) for label, items in labelled.items()))
        for _, (first, *others) in sorted(labelled.items()):
            if not others:
                yield first, name
            elif not is_plain(first):
                self._cannot_check(first, name)

    def _label(self, value: Any) -> str:
        """Return what is known of an item without looking into it, the same in every process."""
        if is_plain(value):
            return repr(plain_words(value))
        if id(value) in self._seen:
            return f"seen {self._seen[id(value)][0]}"
        if isinstance(value, (tuple, frozenset)):
            labels = map(self._label, items_of(value) or ())
            return repr(sorted(labels) if isinstance(value, frozenset) else tuple(labels))
        if isinstance(value, Tensor) and self._is_held(value):
            return f"held {self._held[value.untyped_storage()._cdata][0]} {value.storage_offset()}"
        named = value if isinstance(value, _NAMED) else type(value)
        return f"{type(value).__name__} {named.__module__}.{named.__qualname__}"

    def _of_object(self, value: Any, name: str) -> Parts:
        """Yield the state that `copy` and `pickle` would store of any other object."""
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
            self._put("builtin", value.__module__, value.__qualname__)
            return
        if isinstance(value, np.ufunc) and all(kinds.startswith("O") for kinds in value.types):  # of any function
            self._put("unchecked", value.__name__)
            self._cannot_check(value, name)
            return
        if (wrapped := inspect.getattr_static(value, "__wrapped__", None)) is not None:
            yield wrapped, name
            if isinstance(value, functools._lru_cache_wrapper):
                return
        try:
            reducer = copyreg.dispatch_table.get(type(value))  # of compiled regular expressions, for example
            reduced = value.__reduce_ex__(4) if reducer is None else reducer(value)
        except Exception:  # any class may refuse to be copied with any exception
            self._put("unchecked", type(value).__module__, type(value).__qualname__)
            self._cannot_check(value, name)
            return
        yield type(value), name
        if isinstance(reduced, str):
            self._put("named", reduced)
            return
        _, args, *rest = reduced
        yield from self._of_items("made from", [item for item in args if item is not type(value)], name)
        if is_own(type(value)) and rest and type(rest[0]) is dict and all(type(key) is str for key in rest[0]):
            yield from self._of_settable(rest[0], name, self._written(rest[0]))
            rest = rest[1:]
        for extra in rest:
            if extra is None or isinstance(extra, Mapping):
                yield extra, name
            else:
                yield from self._of_items("state", extra if isinstance(extra, Iterable) else [extra], name)
