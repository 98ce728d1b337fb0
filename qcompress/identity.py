"""Digests of values: equal across processes for equal values, with a list of everything that could not be inspected.

An interrupted run resumes only if nothing that it depends on has changed. Numbers, tensors, containers, models,
functions (their code, defaults, closure and the functions they call) and plain objects are inspected. Everything from
Python's standard library or an installed package is identified by its name, including the private attributes that it
keeps in modules. What cannot be inspected (a lock, an open file, compiled code) is listed in `Identity.unchecked`, so
that the caller can warn. So are attributes that a model's own code writes in a forward pass, unless they are empty:
counters and stored activations must not count, but a state that the output depends on looks the same.
"""

import functools
import hashlib
import inspect
import random
import sys
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qcompress import ownership
from qcompress.bytecode import imports_of, names_in, written_by
from qcompress.ownership import is_library, is_library_module, is_own, is_plain

_WRAPPERS = (staticmethod, classmethod)
_OF_MODULES, _OF_SETTINGS = ("training", "name_or_path"), ("name_or_path", "transformers_version", "architectures")
"""Attributes of modules, and of the configurations of transformers, on which no output depends."""
_FUNCTIONS = (types.FunctionType, types.MethodType)
_RANDOM = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_OF_CLASSES = (types.MemberDescriptorType, types.GetSetDescriptorType)


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a value.

    Attributes:
        digest: SHA-256 in hexadecimal digits, equal for equal values in every process.
        unchecked: items identified by their type alone, for example ``"forward.closure.log: TextIOWrapper"``.
    """

    digest: str
    unchecked: tuple[str, ...] = ()


def identify(value: Any, name: str = "value") -> Identity:
    """Return the identity of a value.

    Args:
        value: any value; an `Identity` is returned unchanged.
        name: name of the value in `Identity.unchecked`.

    >>> def scaled_by(factor):
    ...     return lambda model, batch: model(batch) * factor
    >>> identify(scaled_by(2)) == identify(scaled_by(2)) != identify(scaled_by(3))
    True
    >>> import threading
    >>> identify({"lock": threading.Lock()}, "state").unchecked
    ('state.lock: lock',)
    """
    if isinstance(value, Identity):
        return value
    digest = _Digest()
    digest.add(value, name)
    return digest.identity()


def identify_batches(batches: Iterable[Any], name: str = "data", *, seed: int = 0) -> Identity:
    """Return the identity of all batches in order, with torch's shuffling seeded by ``seed``."""
    digest = _Digest()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        for batch in batches:
            digest.add(batch, name)
            digest.forget()
    return digest.identity()


def identify_read(model: nn.Module, source: Any, weights: str, name: str = "model") -> Identity:
    """Return the identity of a model that gets its weights when it runs.

    Args:
        model: the model; its parameters need not hold values.
        source: what gives it the weights, through hooks; it is not inspected.
        weights: digest of the weights.
        name: name of the model in `Identity.unchecked`.
    """
    digest = _Digest()
    digest.leave_out(source)
    digest.add(weights, name)
    digest.hold(model.parameters())
    digest.add_layers(model, name)
    for path, buffer in model.named_buffers():
        digest.add(path, name)
        digest.add(buffer, f"{name}.{path}")
    return digest.identity()


class _Digest:
    """A SHA-256 that accepts values of any kind."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._unchecked: dict[str, None] = {}
        self._seen: dict[int, tuple[int, Any]] = {}  # id → order of arrival; holding the value keeps its id valid
        self._held: dict[int, tuple[int, Any]] = {}  # the same for the memory of a model's parameters and buffers
        self._assigned: set[str] = set()  # attributes that forward passes assign
        self._written: set[str] = set()  # those, and what they may change otherwise

    def identity(self) -> Identity:
        return Identity(self._sha.hexdigest(), tuple(self._unchecked))

    def forget(self) -> None:
        """Release the values seen so far."""
        self._seen.clear()

    def leave_out(self, value: Any) -> None:
        """Do not inspect a value that others refer to."""
        self._seen[id(value)] = len(self._seen), value

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Identify what shares memory with these tensors by its place in them; their values are added elsewhere."""
        for tensor in tensors:
            if (memory := _memory_of(tensor)) is not None:
                self._held.setdefault(memory._cdata, (len(self._held), memory))

    def add(self, value: Any, name: str) -> None:
        """Add one value; a repeated value is identified by its order of arrival, so that cycles end."""
        if is_plain(value):
            self._put(_plain(value))
        elif isinstance(value, Tensor) and self._is_held(value):
            order, _ = self._held[value.untyped_storage()._cdata]
            self._put("held", order, str(value.dtype), tuple(value.shape), value.stride(), value.storage_offset())
        elif isinstance(value, (np.ndarray, Tensor)):
            self._add_array(value, name)
        elif id(value) in self._seen:
            self._put("seen", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_compound(value, name)

    def _is_held(self, tensor: Tensor) -> bool:
        return (memory := _memory_of(tensor)) is not None and memory._cdata in self._held

    def _put(self, *words: Any) -> None:
        text = repr(words).encode()
        self._sha.update(len(text).to_bytes(8, "big") + text)

    def _add_array(self, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            if value.is_nested:
                return self._add_items("nested tensor", value.unbind(), name)
            if value.layout == torch.sparse_coo:
                whole = value.coalesce()
                return self._add_items("sparse tensor", (list(value.shape), whole.indices(), whole.values()), name)
            if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
                self._put("tensor", str(value.dtype), tuple(value.shape))
                return self._cannot_check(value, name)
            self._put("array", str(value.dtype).removeprefix("torch."), tuple(value.shape))
            flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            return self._sha.update(flat.view(torch.uint8).numpy().data)
        if value.dtype.hasobject:
            return self._add_items("objects", [value.shape, *value.ravel().tolist()], name)
        self._put("array", str(value.dtype), value.shape)
        return self._sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def _add_items(self, kind: str, items: Iterable[Any], name: str) -> None:
        listed = list(items)
        self._put(kind, len(listed))
        for item in listed:
            self.add(item, name)

    def _add_compound(self, value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            self._add_mapping(value, name)
        elif isinstance(value, (list, tuple)):
            self._add_items("sequence", value, name)
        elif isinstance(value, (set, frozenset)):
            self._put("set", sorted(identify(item, name).digest for item in value))
        elif isinstance(value, weakref.ref):
            self._add_items("reference", [value()], name)
        elif isinstance(value, types.ModuleType):
            self._put("module", value.__name__)
        elif isinstance(value, type):
            self._add_class(value, name)
        elif isinstance(value, types.FunctionType):
            self._add_function(value, name)
        elif isinstance(value, types.CodeType):
            self._put("code", value.co_code, value.co_names, value.co_varnames)
            self._add_items("constants", value.co_consts, name)
        elif isinstance(value, types.MethodType):
            self._add_items("method", (value.__func__, value.__self__), name)
        elif isinstance(value, nn.Module):
            self._add_module(value, name)
        else:
            self._add_object(value, name)

    def _add_mapping(self, value: Mapping[Any, Any], name: str) -> None:
        self._put("mapping", len(value))
        for key, item in value.items():  # in its order, which a forward pass may follow
            self.add(key, name)
            self.add(item, f"{name}.{key}")

    def _add_function(self, value: types.FunctionType, name: str) -> None:
        self._put("function", value.__module__, value.__qualname__)
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                self.add(cell.cell_contents, f"{name}.{variable}")
            except ValueError:  # the variable is not bound yet
                self._put("unbound", variable)
        if is_library(value):  # for example the inner function of a decorator around a user's function
            return
        self.add(value.__code__, name)
        self._add_items("defaults", (value.__defaults__, value.__kwdefaults__), name)
        self._add_settable(vars(value), name, written_by(value.__code__))
        words = sorted(names_in(value.__code__))
        for word in words:
            if word in value.__globals__:
                referenced = value.__globals__[word]
                self.add(referenced, f"{name}.{word}")
                self._add_from(referenced, words, f"{name}.{word}", ())
        for level, imported in sorted(imports_of(value.__code__)):
            self._add_import(level, imported, value, words, name)

    def _add_from(self, module: Any, words: Sequence[str], name: str, within: tuple[Any, ...]) -> None:
        """Add the attributes that are taken from a user's module, or from modules in it."""
        if not isinstance(module, types.ModuleType) or is_library_module(module.__name__) or module in within:
            return
        for word in words:
            if word in vars(module):
                self._put(word)
                self.add(vars(module)[word], f"{name}.{word}")
                self._add_from(vars(module)[word], words, f"{name}.{word}", (*within, module))

    def _add_import(
        self, level: int, imported: str, function: types.FunctionType, words: Sequence[str], name: str
    ) -> None:
        """Add what a function takes from a module that it imports itself; nothing is imported here."""
        full = ownership.absolute(level, imported, function)
        self._put("import", full)
        if full in sys.modules:
            self._add_from(sys.modules[full], words, f"{name}.{full}", ())
        elif not ownership.is_installed(full.partition(".")[0]):
            self._unchecked[f"{name}.{full}: module that is not imported yet"] = None

    def _add_class(self, value: type, name: str) -> None:
        self._put("class", value.__module__, value.__qualname__)
        if is_library(value):  # may be made of a user's class, as for parametrizations
            return self._add_items("bases", [base for base in value.__mro__[1:] if not is_library(base)], name)
        self._add_items("bases", value.__bases__, name)
        if issubclass(value, Enum):
            self.add({key: member.value for key, member in value.__members__.items()}, name)
        for key, item in sorted(vars(value).items()):
            if isinstance(item, _WRAPPERS):
                self.add(item.__func__, f"{name}.{key}")
            elif isinstance(item, property):
                self._add_items("property", (item.fget, item.fset), f"{name}.{key}")
            elif isinstance(item, functools.cached_property):
                self.add(item.func, f"{name}.{key}")
            elif isinstance(item, types.FunctionType) or (is_plain(item) and not key.startswith("__")):
                self.add(item, f"{name}.{key}")
            elif not (isinstance(item, _OF_CLASSES) or key == "_abc_impl" or issubclass(value, Enum)):
                self._add_settable({key: item}, name, self._written)
        return None

    def _add_settable(self, items: Mapping[str, Any], name: str, written: Iterable[str]) -> None:
        """Add attributes of a class or function, except those of Python and those that code writes."""
        for key, item in sorted(items.items()):
            if key.startswith("__") or (key.startswith("_") and key.endswith("_")):
                continue
            if key in written:
                self._add_written(item, f"{name}.{key}")
            else:
                self._put(key)
                self.add(item, f"{name}.{key}")

    def _add_written(self, item: Any, name: str) -> None:
        """Name a value that may be a cache or a counter, unless it is empty."""
        if item is not None and not (isinstance(item, (Mapping, Sequence, Set)) and not item):
            self._cannot_check(item, name)

    def _add_module(self, value: nn.Module, name: str) -> None:
        tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
        order = {id(tensor): index for index, (_, tensor) in reversed(list(enumerate(tensors)))}
        known = {id(tensor) for _, tensor in tensors if self._is_held(tensor)}
        self.hold(tensor for _, tensor in tensors)
        self.add_layers(value, name)
        for index, (path, tensor) in enumerate(tensors):
            self._put("tensor", path, order[id(tensor)])
            if order[id(tensor)] == index:
                add = self.add if id(tensor) in known else self._add_array
                add(tensor, f"{name}.{path}")

    def add_layers(self, value: nn.Module, name: str) -> None:
        """Add what a model does with its parameters and buffers: classes, attributes and hooks of its modules."""
        modules = dict(value.named_modules())
        for module in modules.values():
            self._seen.setdefault(id(module), (len(self._seen), module))
        assigned, written = ownership.written_in_passes(modules.values())
        self._assigned |= assigned
        self._written |= written
        for path, module in modules.items():
            self._put("submodule", path)
            self.add(type(module), name)
            self._add_attributes(type(module), vars(module), f"{name}.{path}" if path else name, _OF_MODULES)
            self._add_items("hooks", ownership.hooks_of(module), name)
            if isinstance(module, torch.fx.GraphModule):
                self._put("graph", module.code)

    def _add_attributes(self, kind: type, attributes: Mapping[str, Any], name: str, without: Sequence[str]) -> None:
        """Add the attributes of a module or of settings that it holds, for example a configuration."""
        own, made = is_own(kind), ownership.assigned_by_libraries(kind)
        for key, item in sorted(attributes.items()):
            private = key.startswith("_")
            if key in without or (private and not own) or (private and ownership.is_of_library(key, made)):
                continue
            names = self._assigned if is_plain(item) else self._written  # a plain value cannot be changed
            written = key in names and not isinstance(item, _FUNCTIONS)
            if key not in made and (written or isinstance(item, _RANDOM)):
                self._add_written(item, f"{name}.{key}")
            elif ownership.is_simple(item) or callable(item):
                self._put(key)
                self.add(item, f"{name}.{key}")
            elif ownership.is_settings(item):
                self._put(key)
                self._add_settings(item, f"{name}.{key}")
            elif key not in made and not isinstance(item, RemovableHandle):  # hooks count, not their numbers
                self._put(key)
                self.add(item, f"{name}.{key}")

    def _add_settings(self, item: Any, name: str) -> None:
        new = id(item) not in self._seen
        order, _ = self._seen.setdefault(id(item), (len(self._seen), item))
        self._put(type(item).__qualname__, order)
        if not new:
            return
        if is_own(type(item)):
            self.add(type(item), name)
        names = [*getattr(item, "__dict__", ()), *getattr(item, "__dataclass_fields__", ())]
        labels = _OF_SETTINGS if hasattr(item, "transformers_version") else ()
        self._add_attributes(type(item), {key: getattr(item, key, None) for key in names}, name, labels)

    def _add_object(self, value: Any, name: str) -> None:
        """Add the state that `copy` and `pickle` would store of any other object."""
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
            return self._put("builtin", value.__module__, value.__qualname__)
        if (wrapped := inspect.getattr_static(value, "__wrapped__", None)) is not None:
            self.add(wrapped, name)
            if isinstance(value, functools._lru_cache_wrapper):
                return None
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # any class may refuse to be copied with any exception
            self._put("unchecked", type(value).__module__, type(value).__qualname__)
            return self._cannot_check(value, name)
        self.add(type(value), name)
        if isinstance(reduced, str):
            return self._put("named", reduced)
        _, args, *rest = reduced
        self._add_items("made from", [item for item in args if item is not type(value)], name)
        for extra in rest:
            if extra is None or isinstance(extra, Mapping):
                self.add(extra, name)
            else:
                self._add_items("state", extra if isinstance(extra, Iterable) else [extra], name)
        return None

    def _cannot_check(self, value: Any, name: str) -> None:
        self._unchecked[f"{name}: {type(value).__name__}"] = None


def _plain(value: Any) -> tuple[str, str]:
    """Return type and value; numpy scalars count as Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return type(value).__qualname__, value.name
    return type(value).__name__, repr(value)


def _memory_of(tensor: Tensor) -> Any:
    """Return what holds the values of a dense tensor, or None if it has no memory of its own."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor of another library
        return None
