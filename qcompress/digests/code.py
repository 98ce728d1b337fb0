"""Parts of functions and classes: their code, what they hold, and what they take from modules of the user."""

import functools
import sys
import types
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from qcompress.digests.bytecode import globals_in, imports_of, names_in, stored_globals, written_by
from qcompress.digests.libraries import absolute, is_installed, is_library, is_library_module
from qcompress.digests.ownership import Writes, is_plain
from qcompress.digests.words import HashedWords, Parts

_WRAPPERS = (staticmethod, classmethod)
_OF_CLASSES = (types.MemberDescriptorType, types.GetSetDescriptorType)


class CodeWords(HashedWords):
    """HashedWords of functions and classes."""

    def __init__(self) -> None:
        super().__init__()
        self._writes = Writes()  # of the passes of all models so far

    def _of_function(self, value: types.FunctionType, name: str) -> Parts:
        self._put("function", value.__module__, value.__qualname__)
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield cell.cell_contents, f"{name}.{variable}"
            except ValueError:  # the variable is not bound yet
                self._put("unbound", variable)
        if is_library(value):  # for example the inner function of a decorator around a user's function
            return
        yield value.__code__, name
        yield from self._of_items("defaults", (value.__defaults__, value.__kwdefaults__), name)
        yield from self._of_settable(vars(value), name, written_by(value.__code__))
        modules, stored = [], self._writes.stored | stored_globals(value.__code__)
        for word in sorted(globals_in(value.__code__)):
            if word in value.__globals__:
                referenced = value.__globals__[word]
                if word in stored and not isinstance(referenced, types.FunctionType):
                    self._add_written(referenced, f"{name}.{word}")
                else:
                    yield referenced, f"{name}.{word}"
                    modules.append((referenced, f"{name}.{word}"))
        for level, imported in sorted(imports_of(value.__code__)):
            full = absolute(level, imported, value)
            self._put("import", full)
            if full in sys.modules:  # nothing is imported here
                modules.append((sys.modules[full], f"{name}.{full}"))
            elif not is_installed(full.partition(".")[0]):
                self.unchecked[f"{name}.{full}: module that is not imported yet"] = None
        yield from self._of_modules(modules, sorted(names_in(value.__code__)))

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
        """Yield attributes of a class or function, except those of Python and those that code writes."""
        for key, item in sorted(items.items()):
            if key in written:
                self._add_written(item, f"{name}.{key}")
            elif not key.startswith("__"):
                self._put(key)
                yield item, f"{name}.{key}"

    def _add_written(self, item: Any, name: str) -> None:
        """Name a value that may be a cache or a counter, unless it is empty."""
        if item is not None and not (isinstance(item, (Mapping, Sequence, Set)) and not item):
            self._cannot_check(item, name)
