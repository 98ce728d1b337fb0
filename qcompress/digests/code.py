"""Parts of functions and classes: their code, what they hold, and what they take from modules of the user."""

import functools
import sys
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from torch import Tensor

from qcompress.digests.bytecode import (
    globals_in,
    imports_of,
    looked_up_by,
    names_in,
    passed_on,
    stored_globals,
    written_by,
)
from qcompress.digests.libraries import absolute, is_installed, is_library, is_library_module
from qcompress.digests.ownership import Writes, attached_to, is_own, is_plain
from qcompress.digests.words import HashedWords, Parts

_WRAPPERS = (staticmethod, classmethod)
_OF_CLASSES = (types.MemberDescriptorType, types.GetSetDescriptorType)
_OF_PYTHON = {
    "__abstractmethods__", "__all__", "__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__",
    "__builtins__", "__cached__", "__dataclass_fields__", "__dataclass_params__", "__dict__", "__doc__", "__file__",
    "__firstlineno__", "__loader__", "__module__", "__name__", "__orig_bases__", "__package__", "__parameters__",
    "__path__", "__qualname__", "__slotnames__", "__slots__", "__spec__", "__static_attributes__", "__type_params__",
    "__warningregistry__", "__weakref__",
}  # fmt: skip
"""Attributes that Python sets in classes and modules, from their code or for itself."""


class CodeWords(HashedWords):
    """HashedWords of functions and classes."""

    def __init__(self) -> None:
        super().__init__()
        self._writes = Writes()  # of the passes of all models so far

    def _of_function(self, value: types.FunctionType, name: str) -> Parts:
        self._put("function", value.__module__, value.__qualname__)
        closed_over = self._closed_over(value)
        if is_library(value):  # for example the inner function of a decorator around a user's function
            for variable, item in closed_over.items():
                if isinstance(item, weakref.WeakKeyDictionary):  # of functools, for the types that were met
                    self.leave_out(item)
                yield item, f"{name}.{variable}"
            yield from self._of_settable(vars(value) if closed_over else {}, name, ())
            return
        yield value.__code__, name
        yield from self._of_items("defaults", (value.__defaults__, value.__kwdefaults__), name)
        yield from self._of_settable(vars(value), name, written_by(value.__code__))
        modules, stored = [], self._writes.stored | stored_globals(value.__code__)
        used = {word: value.__globals__[word] for word in globals_in(value.__code__) if word in value.__globals__}
        passed = passed_on(value.__code__)
        for word, referenced in [*closed_over.items(), *sorted(used.items())]:
            if word in used and word in stored and not isinstance(referenced, types.FunctionType):
                self._add_written(referenced, f"{name}.{word}")
                continue
            modules.append((referenced, f"{name}.{word}"))
            if isinstance(referenced, types.ModuleType) and word not in passed:
                self._put("module", referenced.__name__)
            else:
                yield referenced, f"{name}.{word}"
        for word in sorted(looked_up_by(value.__code__) - used.keys()):
            self.unchecked[f"{name}.{word}: what it finds when it runs"] = None
        for level, imported in sorted(imports_of(value.__code__)):
            full = absolute(level, imported, value)
            self._put("import", full)
            if full in sys.modules:  # nothing is imported here
                modules.append((sys.modules[full], f"{name}.{full}"))
            elif not is_installed(full.partition(".")[0]):
                self.unchecked[f"{name}.{full}: module that is not imported yet"] = None
        yield from self._of_modules(modules, sorted(names_in(value.__code__)))

    def _closed_over(self, value: types.FunctionType) -> dict[str, Any]:
        """Return the variables of a function's closure."""
        found = {}
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                found[variable] = cell.cell_contents
            except ValueError:  # the variable is not bound yet
                self._put("unbound", variable)
        return found

    def _of_code(self, value: types.CodeType, name: str) -> Parts:
        """Yield the constants of code; its names, flags and arguments are put."""
        arguments = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
        variables = (value.co_varnames, value.co_freevars, value.co_cellvars)
        self._put("code", value.co_code, value.co_names, value.co_exceptiontable, arguments, variables)
        return self._of_items("constants", value.co_consts, name)

    def _of_held_module(self, value: types.ModuleType, name: str) -> Parts:
        """Yield all that a user's module holds, for code that may take anything from it."""
        self._put("module", value.__name__)
        if not is_library_module(value, value.__name__):
            functions = [item for item in vars(value).values() if isinstance(item, types.FunctionType)]
            stored = [stored_globals(item.__code__) for item in functions if item.__globals__ is vars(value)]
            yield from self._of_settable(vars(value), name, self._writes.stored.union(*stored))

    def _of_kind(self, value: Any, name: str) -> Parts:
        """Yield what a value has besides its contents: its class, and its attributes, if a user may have set any."""
        kind = type(value)
        self._put("kind", kind.__module__, kind.__qualname__)
        if is_own(kind):
            yield kind, name
        elif not isinstance(value, Tensor):
            return
        attributes = attached_to(value)
        written = [key for key, item in attributes.items() if self._writes.to(key, item)]
        yield from self._of_settable(attributes, name, written)

    def _of_modules(self, waiting: list[tuple[Any, str]], words: Sequence[str]) -> Parts:
        """Yield the attributes that are taken from a user's modules, and from modules in them."""
        met = set()
        for module, name in waiting:  # which grows
            if not isinstance(module, types.ModuleType) or module in met or is_library_module(module, module.__name__):
                continue
            met.add(module)
            for word in words:
                if word in vars(module):
                    self._put(word)
                    yield vars(module)[word], f"{name}.{word}"
                    waiting.append((vars(module)[word], f"{name}.{word}"))

    def _of_class(self, value: type, name: str) -> Parts:
        self._put("class", value.__module__, value.__qualname__)
        if is_library(value):  # may be made of a user's class, as for parametrizations
            yield from self._of_items("bases", [base for base in value.__mro__[1:] if not is_library(base)], name)
            return
        yield from self._of_items("made by and of", (type(value), *value.__bases__), name)
        if issubclass(value, Enum):
            yield {key: member.value for key, member in value.__members__.items()}, name
        for key, item in sorted(vars(value).items()):
            if isinstance(item, _WRAPPERS):
                self._put(type(item).__name__)
                yield item.__func__, f"{name}.{key}"
            elif isinstance(item, property):
                yield from self._of_items("property", (item.fget, item.fset), f"{name}.{key}")
            elif isinstance(item, functools.cached_property):
                yield item.func, f"{name}.{key}"
            elif isinstance(item, types.FunctionType):
                yield item, f"{name}.{key}"
            elif not (
                isinstance(item, _OF_CLASSES) or key == "_abc_impl" or (issubclass(value, Enum) and not is_plain(item))
            ):
                yield from self._of_settable({key: item}, name, {key} if self._writes.to(key, item) else ())

    def _of_settable(self, items: Mapping[str, Any], name: str, written: Iterable[str]) -> Parts:
        """Yield attributes of a class or function, except those that Python sets and those that code writes."""
        for key, item in sorted(items.items()):
            if key in written:
                self._add_written(item, f"{name}.{key}")
            elif key not in _OF_PYTHON:
                self._put(key)
                yield item, f"{name}.{key}"

    def _add_written(self, item: Any, name: str) -> None:
        """Name a value that may be a cache or a counter, unless it is empty."""
        if item is not None and not (isinstance(item, (Mapping, Sequence, Set)) and not item):
            self._cannot_check(item, name)
