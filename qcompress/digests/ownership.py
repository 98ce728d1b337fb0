"""What kind of value something is: the user's own or a library's, plain or not, written by a pass or not.

What belongs to Python or an installed package is known by its name; only what the user wrote can change unnoticed.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.digests.bytecode import (
    CHANGING_OPERATORS,
    assigned_by,
    cached_in,
    changing_operators_in,
    functions_in,
    globals_in,
    names_in,
    rebound_by,
    stored_globals,
    written_by,
)
from qcompress.digests.libraries import is_library

OF_LIBRARIES = (
    "_qcompress", "_is_hf_", "_output_capturing_", "_torchdynamo_", "_dynamo_",
    "_hf_hook", "_hf_peft_config_loaded", "_hf_quantized_needs_local_tp",
)  # fmt: skip
"""How private attributes begin that libraries set in modules and parameters of others."""
_HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}
"""Where a module keeps its hooks, and the numbers of those that were registered with a flag."""
_OF_MEMBERS = ("_value_", "_name_", "__objclass__", "_sort_order_", "_inverted_")
"""Attributes that Python sets in members of enumerations."""
_CAPTURING = "transformers.utils.output_capturing"
_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
"""Module and name of the class that `torch.compile` returns."""
_PLAIN = (
    bool, int, float, complex, str, bytes, Enum, PurePath, range, np.generic, torch.dtype, torch.device,
    type(None), type(...),
)  # fmt: skip
PYTHONS = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Kinds of most plain values; none of them is a user's."""
_CACHED = type(functools.cache(len))
_MODULE = frozenset(vars(nn.Module()))
_MAKING = {
    "__init__", "__post_init__", "__new__", "__init_subclass__", "__set_name__", "__del__", "__copy__", "__deepcopy__",
    "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__",
}  # fmt: skip
"""Methods by which objects are made and copied; Python calls others like them in passes."""
_NOT_IN_ALL_PASSES = _MAKING | CHANGING_OPERATORS
_OTHERWISE = (nn.Module, Mapping, Sequence, Set)
"""What is looked into in another way than by its attributes."""


def hooks_of(module: nn.Module) -> list[tuple[tuple[Any, ...], Any]]:
    """Return what runs before and after a module's passes, each hook with its kind and flags.

    Left out is what transformers registers in passes to store outputs.
    """
    return [
        ((kind, *(number in getattr(module, flag) for flag in flags)), hook)
        for kind, flags in _HOOKS.items()
        for number, hook in getattr(module, kind).items()
        if not (type(hook) is types.FunctionType and hook.__module__ == _CAPTURING)
    ]


def hooks_on(tensor: Tensor) -> list[Any]:
    """Return what runs in backward passes through a tensor."""
    return [
        hook for each in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) for hook in (each or {}).values()
    ]


def attached_to(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, in its dictionary and in slots of fields or that a user's class declares.

    No code of the user runs. Left out is what libraries set in tensors, and Python in members of enumerations.
    """
    others = OF_LIBRARIES if isinstance(value, Tensor) else _OF_MEMBERS if isinstance(value, Enum) else ()
    kind = type(value)
    fields = inspect.getattr_static(kind, "__dataclass_fields__", ())
    found: dict[Any, Any] = {}
    for base in kind.__mro__:
        library = is_library(base)
        for key, item in () if library and not fields else vars(base).items():
            if isinstance(item, types.MemberDescriptorType) and (key in fields or not library):
                with contextlib.suppress(AttributeError):  # nothing is in the slot
                    found.setdefault(key, item.__get__(value, kind))
    found.update(dict.items({} if (own := dictionary_of(value)) is None else own))
    return {key: item for key, item in found.items() if isinstance(key, str) and not key.startswith(others)}


def dictionary_of(value: Any) -> dict[str, Any] | None:
    """Return where an object keeps its attributes, if it does, without asking its class."""
    for base in type(value).__mro__:
        if isinstance(item := vars(base).get("__dict__"), types.GetSetDescriptorType | types.MemberDescriptorType):
            found: dict[str, Any] = item.__get__(value, type(value))
            return found
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Writes:
    """What code of the user may write when modules run.

    Attributes:
        assigned: names of attributes, and patterns of names, that it may assign.
        changed: those, and the names of attributes that it may change otherwise.
        stored: names of globals that it assigns.
    """

    assigned: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()

    def __or__(self, other: "Writes") -> "Writes":
        return Writes(self.assigned | other.assigned, self.changed | other.changed, self.stored | other.stored)

    def to(self, key: str, item: Any) -> bool:
        """Whether passes may write an attribute with this name and value; a plain value cannot be changed."""
        names = self.assigned if is_plain(item) else self.changed
        return key in names or any("*" in name and fnmatchcase(key, name) for name in names)


def written_in_passes(modules: Iterable[nn.Module]) -> Writes:
    """Return what code of the user may write when the modules run.

    Followed are ``forward``, hooks and what operators call (those that change something, only where they are used) and,
    from there, all methods of the modules and of what they hold, and functions, by their names.
    """
    listed = list(modules)
    waiting: list[Any] = [
        run for module in listed for run in (*(hook for _, hook in hooks_of(module)), vars(module).get("forward"))
    ]
    held = [*listed, *(item for module in listed for item in vars(module).values()), *map(_receiver, waiting)]
    bases = {base for kind in set(map(type, held)) for base in kind.__mro__ if not is_library(base)}
    methods: dict[str, list[types.FunctionType]] = {}
    for base in bases:
        for name, method in functions_in(base):
            methods.setdefault(name, []).append(method)
    for name, found_by_name in methods.items():
        if name == "forward" or (name.startswith("__") and name not in _NOT_IN_ALL_PASSES):  # as for operators
            waiting += found_by_name
    found: set[types.CodeType] = set()
    while waiting:
        function = _function_of(waiting.pop())
        if function is not None and not is_library(function) and function.__code__ not in found:
            found.add(function.__code__)
            waiting += map(function.__globals__.get, globals_in(function.__code__))
            for name in names_in(function.__code__) | changing_operators_in(function.__code__):
                waiting += methods.get(name, ())
    cached = frozenset().union(*map(cached_in, bases))
    assigned, changed, stored = (
        frozenset().union(*map(names, found)) for names in (rebound_by, written_by, stored_globals)
    )
    return Writes(assigned | cached, changed | cached, stored)


def _receiver(hook: Any) -> Any:
    """The object that a hook runs on: a method's own, or the hook itself."""
    while type(hook) is functools.partial:
        hook = hook.func
    return hook.__self__ if type(hook) is types.MethodType else hook


def _function_of(value: Any) -> types.FunctionType | None:
    """The function behind a method and its decorators; nothing else is asked for an attribute, as it may answer all."""
    while type(value) is functools.partial:
        value = value.func
    if type(value) is types.MethodType:
        value = value.__func__
    function = inspect.unwrap(value) if type(value) in (types.FunctionType, _CACHED) else None
    return function if isinstance(function, types.FunctionType) else None


def assigned_by_libraries(kind: type, *, setters: bool = True) -> frozenset[str]:
    """Return the names of attributes that the classes of libraries that a class is made of assign.

    What only their properties assign may be set by users.
    """
    return _assigned_in(tuple(base for base in kind.__mro__ if is_library(base)), setters)


@functools.lru_cache(maxsize=256)
def _assigned_in(classes: tuple[type, ...], setters: bool = True) -> frozenset[str]:
    codes = (
        function.__code__
        for each in classes
        if each is not nn.Module
        for _, function in functions_in(each, setters=setters)
    )
    return frozenset().union(*map(assigned_by, codes))


def is_of_library(key: str, kind: type) -> bool:
    """Whether an attribute of an object of a class is one that PyTorch or another library keeps there for itself."""
    module = issubclass(kind, nn.Module)
    if (kind.__module__, kind.__name__) == _COMPILED:  # what is set there goes to the module inside
        return True
    if not key.startswith("_"):
        return module and (key == "training" or (key == "name_or_path" and key in assigned_by_libraries(kind)))
    if module and (hasattr(nn.Module, key) or key in _MODULE):
        return True
    if key in _assigned_in(tuple(base for base in kind.__mro__ if not is_library(base))):
        return False
    return key in assigned_by_libraries(kind, setters=False) or (module and key.startswith(OF_LIBRARIES))


def is_own(kind: type) -> bool:
    """Whether a class is made by the user, at least in part."""
    return not all(map(is_library, kind.__mro__))


def is_configuration(value: Any) -> bool:
    """Whether a value has the form of a configuration of transformers."""
    return inspect.getattr_static(value, "transformers_version", _CACHED) is not _CACHED


def is_settings(value: Any) -> bool:
    """Whether a value is a bundle of attributes: a namespace, a configuration, or an object of a user's plain class."""
    kind: Any = type(value)
    if kind is types.SimpleNamespace or is_configuration(value):
        return True
    if isinstance(value, _OTHERWISE) or not is_own(kind) or assigned_by_libraries(kind):
        return False
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    pickled = any("__getstate__" in vars(base) or vars(base).get("__slots__") for base in kind.__mro__[:-1])
    return dataclasses.is_dataclass(kind) or (plain and not pickled and dictionary_of(value) is not None)


def is_plain(value: Any) -> bool:
    """Whether a value is known by its text, and by its class if that is the user's own."""
    return isinstance(value, _PLAIN) and not isinstance(value, np.void)  # which may hold objects


def is_simple(value: Any) -> bool:
    """Whether a value is plain, or a container of plain values, also if it holds itself."""
    waiting, met = [value], {id(value): value}
    while waiting:
        item = waiting.pop()
        if (found := items_of(item)) is not None:
            held = {id(each): each for each in found}
            waiting += [each for key, each in held.items() if key not in met]
            met |= held
        elif not is_plain(item) and not (isinstance(item, Mapping) and is_own(type(item))):
            return False
    return True


def items_of(value: Any) -> list[Any] | None:
    """Return the values of a container, as Python keeps them; None if it is none, or a user's other mapping."""
    bases: tuple[Any, ...] = (list, tuple, set, frozenset, deque)
    for base in bases:
        if isinstance(value, base):
            return list(base.__iter__(value))
    if isinstance(value, dict):
        return list(dict.values(value))
    return list(value.values()) if isinstance(value, Mapping) and not is_own(type(value)) else None
