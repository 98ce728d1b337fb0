"""What kind of value something is: the user's own or a library's, plain or not, written by a pass or not.

What belongs to Python or an installed package is known by its name; only what the user wrote can change unnoticed.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompress.digests.bytecode import assigned_by, functions_in, globals_in, names_in, rebound_by, written_by
from qcompress.digests.libraries import is_library

_OF_LIBRARIES = ("_qcompress", "_hf_", "_is_hf_")
"""How private attributes begin that libraries set in modules of others."""
_CACHED = type(functools.cache(len))
_MODULE = frozenset(vars(nn.Module()))
_OTHERWISE = (nn.Module, Mapping, Sequence, Set)
"""What is looked into in another way than by its attributes."""


def hooks_of(module: nn.Module) -> list[Any]:
    """Return what runs before and after a module."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def written_in_passes(modules: Iterable[nn.Module]) -> tuple[set[str], set[str]]:
    """Return the names of attributes that code of the user may assign, and may change, when the modules run.

    Followed are ``forward`` and hooks and, from there, all methods of the modules and of what they hold, and functions,
    by their names.
    """
    methods: dict[str, list[types.FunctionType]] = {}
    kinds = {type(item) for module in modules for item in (module, *vars(module).values())}
    for base in {base for kind in kinds for base in kind.__mro__ if not is_library(base)}:
        for name, method in functions_in(base):
            methods.setdefault(name, []).append(method)
    waiting: list[Any] = list(methods.get("forward", ()))
    for module in modules:
        waiting += (*hooks_of(module), vars(module).get("forward"))
    found: set[types.CodeType] = set()
    while waiting:
        function = _function_of(waiting.pop())
        if function is not None and not is_library(function) and function.__code__ not in found:
            found.add(function.__code__)
            waiting += map(function.__globals__.get, globals_in(function.__code__))
            for name in names_in(function.__code__):
                waiting += methods.get(name, ())
    assigned, written = ({name for code in found for name in names(code)} for names in (rebound_by, written_by))
    return assigned, written


def _function_of(value: Any) -> types.FunctionType | None:
    """The function behind a method and its decorators; nothing else is asked for an attribute, as it may answer all."""
    if type(value) is types.MethodType:
        value = value.__func__
    function = inspect.unwrap(value) if type(value) in (types.FunctionType, _CACHED) else None
    return function if isinstance(function, types.FunctionType) else None


def assigned_by_libraries(kind: type) -> frozenset[str]:
    """Return the names of attributes that the classes of libraries that a class is made of assign."""
    return _assigned_in(tuple(base for base in kind.__mro__ if is_library(base)))


@functools.lru_cache(maxsize=256)
def _assigned_in(classes: tuple[type, ...]) -> frozenset[str]:
    codes = (function.__code__ for each in classes if each is not nn.Module for _, function in functions_in(each))
    return frozenset().union(*map(assigned_by, codes))


def is_of_library(key: str, kind: type) -> bool:
    """Whether an attribute of an object of a class is one that PyTorch or another library keeps there for itself."""
    if not key.startswith("_"):
        return False
    if issubclass(kind, nn.Module) and (hasattr(nn.Module, key) or key in _MODULE):
        return True
    if key in _assigned_in(tuple(base for base in kind.__mro__ if not is_library(base))):
        return False
    return key in assigned_by_libraries(kind) or key.startswith(_OF_LIBRARIES)


def is_own(kind: type) -> bool:
    """Whether a class is made by the user, at least in part, so that its private attributes are the user's."""
    return kind is types.SimpleNamespace or not all(map(is_library, kind.__mro__))


def is_settings(value: Any) -> bool:
    """Whether a value is a bundle of attributes: a namespace, a dataclass, or an object of a user's plain class."""
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        return True
    kind: Any = type(value)
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    pickled = any("__getstate__" in vars(base) for base in kind.__mro__[:-1]) or assigned_by_libraries(kind)
    return plain and not pickled and is_own(kind) and hasattr(value, "__dict__") and not isinstance(value, _OTHERWISE)


def is_plain(value: Any) -> bool:
    """Whether a value is known by its text."""
    plain = (bool, int, float, complex, str, bytes, Enum, PurePath, range, np.generic)
    return value is None or value is ... or isinstance(value, (*plain, torch.dtype, torch.device))


def is_simple(value: Any) -> bool:
    """Whether a value is plain, or a container of plain values, also if it holds itself."""
    waiting, met = [value], {id(value): value}
    while waiting:
        item = waiting.pop()
        if isinstance(item, (Mapping, list, tuple, set, frozenset)):
            held = {id(each): each for each in (item.values() if isinstance(item, Mapping) else item)}
            waiting += [each for key, each in held.items() if key not in met]
            met |= held
        elif not is_plain(item):
            return False
    return True
