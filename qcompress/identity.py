"""Digests of values: equal across processes for equal values, with a list of everything that could not be inspected.

An interrupted run resumes only if nothing that it depends on has changed. Numbers, tensors, containers, models,
functions (their code, defaults, closure and the functions they call) and plain objects are inspected. Everything from
Python's standard library or an installed package is identified by its name. What cannot be inspected (a lock, an open
file, compiled code) is identified by its type and listed in `Identity.unchecked`, so that the caller can warn.
"""

import dataclasses
import functools
import hashlib
import inspect
import sysconfig
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARY = tuple(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib"))
_BY_NAME = ("qcompress", "solvers", "formulations", "torch", "numpy")
_WRAPPERS = (staticmethod, classmethod)
_OF_MODULES, _OF_SETTINGS = ("training", "name_or_path"), ("name_or_path", "transformers_version", "architectures")
"""Attributes of modules, and of the configurations of transformers, on which no output depends."""


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

    def identity(self) -> Identity:
        return Identity(self._sha.hexdigest(), tuple(self._unchecked))

    def forget(self) -> None:
        """Release the values seen so far."""
        self._seen.clear()

    def leave_out(self, value: Any) -> None:
        """Do not inspect a value that others refer to."""
        self._seen[id(value)] = len(self._seen), value

    def add(self, value: Any, name: str) -> None:
        """Add one value; a repeated value is identified by its order of arrival, so that cycles end."""
        if _is_plain(value):
            self._put(_plain(value))
        elif isinstance(value, (np.ndarray, Tensor)):
            self._add_array(value, name)
        elif id(value) in self._seen:
            self._put("seen", self._seen[id(value)][0])
        else:
            self._seen[id(value)] = len(self._seen), value
            self._add_compound(value, name)

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
        for key in sorted(value, key=repr):
            self.add(key, name)
            self.add(value[key], f"{name}.{key}")

    def _add_function(self, value: types.FunctionType, name: str) -> None:
        self._put("function", value.__module__, value.__qualname__)
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                self.add(cell.cell_contents, f"{name}.{variable}")
            except ValueError:  # the variable is not bound yet
                self._put("unbound", variable)
        if _is_library(value):  # for example the inner function of a decorator around a user's function
            return
        self.add(value.__code__, name)
        self._add_items("defaults", (value.__defaults__, value.__kwdefaults__), name)
        words = sorted(_names_in(value.__code__))
        for word in words:
            if word in value.__globals__:
                referenced = value.__globals__[word]
                self.add(referenced, f"{name}.{word}")
                if isinstance(referenced, types.ModuleType) and not _is_library_module(referenced.__name__):
                    for inner in words:  # attributes taken from a user's module
                        if inner in vars(referenced):
                            self.add(vars(referenced)[inner], f"{name}.{word}.{inner}")

    def _add_class(self, value: type, name: str) -> None:
        self._put("class", value.__module__, value.__qualname__)
        if _is_library(value):
            return
        self._add_items("bases", value.__bases__, name)
        for key, item in sorted(vars(value).items()):
            if isinstance(item, _WRAPPERS):
                self.add(item.__func__, f"{name}.{key}")
            elif isinstance(item, property):
                self._add_items("property", (item.fget, item.fset), f"{name}.{key}")
            elif isinstance(item, types.FunctionType) or (_is_plain(item) and not key.startswith("__")):
                self.add(item, f"{name}.{key}")

    def _add_module(self, value: nn.Module, name: str) -> None:
        self.add_layers(value, name)
        tensors = [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]
        order = {id(tensor): index for index, (_, tensor) in reversed(list(enumerate(tensors)))}
        for index, (path, tensor) in enumerate(tensors):
            self._put("tensor", path, order[id(tensor)])
            if order[id(tensor)] == index:
                self.add(tensor, f"{name}.{path}")

    def add_layers(self, value: nn.Module, name: str) -> None:
        """Add what a model does with its parameters and buffers: classes, attributes and hooks of its modules."""
        for path, module in value.named_modules():
            self._put("submodule", path)
            self.add(type(module), name)
            self._add_attributes(vars(module), name, _OF_MODULES)
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            self._add_items("hooks", hooks, name)

    def _add_attributes(self, attributes: Mapping[str, Any], name: str, without: Sequence[str]) -> None:
        for key, item in sorted(attributes.items()):
            if key.startswith("_") or key in without:
                continue
            if _is_simple(item) or callable(item):
                self._put(key)
                self.add(item, f"{name}.{key}")
            elif isinstance(item, types.SimpleNamespace) or dataclasses.is_dataclass(item):  # settings
                new = id(item) not in self._seen
                order, _ = self._seen.setdefault(id(item), (len(self._seen), item))
                self._put(key, type(item).__qualname__, order)
                if not new:
                    continue
                names = [*getattr(item, "__dict__", ()), *getattr(item, "__dataclass_fields__", ())]
                labels = _OF_SETTINGS if hasattr(item, "transformers_version") else ()
                self._add_attributes({key: getattr(item, key, None) for key in names}, f"{name}.{key}", labels)

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


def _is_plain(value: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes, Enum, PurePath, range, np.generic)
    return value is None or value is ... or isinstance(value, (*plain, torch.dtype, torch.device))


def _plain(value: Any) -> tuple[str, str]:
    """Return type and value; numpy scalars count as Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return type(value).__qualname__, value.name
    return type(value).__name__, repr(value)


def _is_simple(value: Any) -> bool:
    """Whether a value is plain, or a container of plain values."""
    if isinstance(value, Mapping):
        return all(map(_is_simple, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_simple, value))
    return _is_plain(value)


def _names_in(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function's code and in the functions defined within it."""
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


def _is_library(value: Any) -> bool:
    return _is_library_module(getattr(value, "__module__", None) or "builtins")


@functools.cache
def _is_library_module(name: str) -> bool:
    """Whether a module belongs to Python or an installed package rather than to the user."""
    import sys

    if name.partition(".")[0] in _BY_NAME:
        return True
    module = sys.modules.get(name)
    if name == "__main__" or module is None:
        return False
    file = getattr(module, "__file__", None)
    return file is None or str(Path(file).resolve()).startswith(_LIBRARY)
