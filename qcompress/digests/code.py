"""Parts of functions and classes: their code, what they hold, and what they take from modules of the user."""

import builtins
import functools
import importlib
import sys
import types
import weakref
from collections.abc import Iterable, Mapping, Sequence, Set
from enum import Enum, Flag
from typing import Any

import torch
from torch import Tensor

from qcompress.digests.bytecode import (
    attributes_in,
    bound_by_imports,
    globals_in,
    imports_of,
    names_in,
    passed_on,
    rebound_by,
    stored_globals,
    written_by,
)
from qcompress.digests.libraries import absolute, is_installed, is_library, is_library_module
from qcompress.digests.ownership import Writes, attached_to, is_own, items_of
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

_OF_ENUMERATIONS = frozenset(vars(Flag("Made", ()))) - {"_boundary_"}
"""Attributes that Python sets in enumerations."""
_AUTOGRAD = (torch.autograd.Function, torch.autograd.function.BackwardCFunction)
_OF_AUTOGRAD = ("_backward_cls", "_autograd_function_id")
"""What PyTorch sets in classes of custom functions: the class of their backward passes, with a counter."""
_OF_TORCH = ("_torchdynamo_", "_dynamo_")
"""How attributes begin that PyTorch sets in functions and classes; some are addresses."""
_LOOKING_UP = {
    "globals": globals, "eval": eval, "exec": exec, "__import__": __import__,
    "import_module": importlib.import_module, "sys.modules": sys.modules,
}  # fmt: skip
"""What finds values or modules by a text."""


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
                if value.__globals__ is vars(functools) and variable == "cache_token":  # counts abstract classes
                    continue
                if isinstance(item, weakref.WeakKeyDictionary):  # of functools, for the types that were met
                    self.leave_out(item)
                yield item, f"{name}.{variable}"
            yield from self._of_settable(vars(value) if closed_over else {}, name, ())
            return
        yield value.__code__, name
        yield from self._of_items("defaults", (value.__defaults__, value.__kwdefaults__), name)
        code = value.__code__
        written = Writes(frozenset(rebound_by(code)), frozenset(written_by(code)), frozenset(stored_globals(code)))
        yield from self._of_settable(vars(value), name, written.changed)
        written |= self._writes
        used = {word: value.__globals__[word] for word in globals_in(code) if word in value.__globals__}
        passed = passed_on(code)
        modules = []
        for word, referenced in [*closed_over.items(), *sorted(used.items())]:
            if word in used and word in written.stored and not isinstance(referenced, types.FunctionType):
                self._add_written(referenced, f"{name}.{word}")
                continue
            modules.append((referenced, f"{name}.{word}"))
            yield from self._of_taken(word, referenced, passed, f"{name}.{word}")
        for word in _looked_up(code, {**closed_over, **used}):
            self.unchecked[f"{name}.{word}: what it finds when it runs"] = None
        for imported, taken, _ in bound_by_imports(code):
            top = imported.partition(".")[0]
            if not taken and top != imported and top in sys.modules:
                modules.append((sys.modules[top], f"{name}.{top}"))
                yield from self._of_taken(imported, sys.modules[top], passed, f"{name}.{top}")
        for level, imported in sorted(imports_of(code)):
            full = absolute(level, imported, value)
            self._put("import", full)
            if full in sys.modules:  # nothing is imported here
                modules.append((sys.modules[full], f"{name}.{full}"))
                yield from self._of_taken(imported, sys.modules[full], passed, f"{name}.{full}")
            elif not is_installed(full.partition(".")[0]):
                self.unchecked[f"{name}.{full}: module that is not imported yet"] = None
        yield from self._of_modules(modules, sorted(names_in(code)), passed, written)

    def _of_taken(self, word: str, item: Any, passed: Set[str], name: str) -> Parts:
        """Yield what code takes by a name; of a module that it only takes attributes of, `_of_modules` yields these."""
        if isinstance(item, types.ModuleType) and word not in passed:
            self._put("module", item.__name__)
        else:
            yield item, name

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
            written = [key for key, item in vars(value).items() if _is_written(key, item, self._writes)]
            yield from self._of_settable(vars(value), name, self._writes.stored.union(written, *stored))

    def _of_kind(self, value: Any, name: str) -> Parts:
        """Yield what a value has besides its contents: its class, and its attributes, if a user may have set any."""
        kind = type(value)
        self._put("kind", kind.__module__, kind.__qualname__)
        if is_own(kind):
            yield kind, name
        elif not isinstance(value, Tensor):
            return
        attributes = attached_to(value)
        yield from self._of_settable(attributes, name, self._written(attributes))

    def _written(self, attributes: Mapping[str, Any]) -> list[str]:
        """Return the names of attributes that passes may write."""
        return [key for key, item in attributes.items() if self._writes.to(key, item)]

    def _of_modules(
        self, waiting: list[tuple[Any, str]], words: Sequence[str], passed: Set[str], written: Writes
    ) -> Parts:
        """Yield the attributes that are taken from a user's modules, and from modules in them."""
        met = set()
        for module, name in waiting:  # which grows
            if not isinstance(module, types.ModuleType) or module in met or is_library_module(module, module.__name__):
                continue
            met.add(module)
            for word in words:
                if word not in vars(module):
                    continue
                item = vars(module)[word]
                if _is_written(word, item, written):
                    self._add_written(item, f"{name}.{word}")
                    continue
                self._put(word)
                yield from self._of_taken(word, item, passed, f"{name}.{word}")
                waiting.append((item, f"{name}.{word}"))

    def _of_class(self, value: type, name: str) -> Parts:
        self._put("class", value.__module__, value.__qualname__)
        if is_library(value):  # may be made of a user's class, as for parametrizations
            yield from self._of_items("bases", [base for base in value.__mro__[1:] if not is_library(base)], name)
            return
        yield from self._of_items("made by and of", (type(value), *value.__bases__), name)
        if issubclass(value, Enum):
            yield value._member_map_, name
        made = {*_OF_ENUMERATIONS, *value._member_map_} if issubclass(value, Enum) else set()
        if issubclass(value, _AUTOGRAD):
            made |= {*_OF_AUTOGRAD}
        for key, item in sorted(vars(value).items()):
            if isinstance(item, _WRAPPERS):
                self._put(type(item).__name__)
                yield item.__func__, f"{name}.{key}"
            elif isinstance(item, types.FunctionType):
                yield item, f"{name}.{key}"
            elif key in made:
                continue
            elif isinstance(item, (property, types.DynamicClassAttribute)):
                yield from self._of_items("property", (item.fget, item.fset), f"{name}.{key}")
            elif isinstance(item, functools.cached_property):
                yield item.func, f"{name}.{key}"
            elif not (isinstance(item, _OF_CLASSES) or key == "_abc_impl"):
                yield from self._of_settable({key: item}, name, {key} if self._writes.to(key, item) else ())

    def _of_settable(self, items: Mapping[str, Any], name: str, written: Iterable[str]) -> Parts:
        """Yield attributes of a class or function, except those that Python sets and those that code writes."""
        for key, item in sorted(items.items()):
            if key in written:
                self._add_written(item, f"{name}.{key}")
            elif key not in _OF_PYTHON and not key.startswith(_OF_TORCH):
                self._put(key)
                yield item, f"{name}.{key}"

    def _add_written(self, item: Any, name: str) -> None:
        """Name a value that may be a cache or a counter, unless it is empty."""
        if item is not None and items_of(item) != []:
            self._cannot_check(item, name)


def _is_written(key: str, item: Any, writes: Writes) -> bool:
    """Whether an attribute of a module may be written; those that are code count in any case."""
    return writes.to(key, item) and not isinstance(item, (type, types.FunctionType, types.ModuleType))


def _looked_up(code: types.CodeType, given: Mapping[str, Any]) -> list[str]:
    """Return what code calls or reads to find values or modules by a name that only its run shows.

    Args:
        code: the code.
        given: what its variables hold; others are builtins, or bound by imports in it.
    """
    held = {word: vars(builtins).get(word) for word in globals_in(code)} | {**given}
    for module, taken, variable in bound_by_imports(code):
        place = sys.modules.get(module if taken else module.partition(".")[0])
        held[variable] = vars(place).get(taken) if taken and isinstance(place, types.ModuleType) else place
    found = {id(held.get(variable)) for variable, _ in attributes_in(code)}
    found |= {id(vars(held[v]).get(a)) for v, a in attributes_in(code) if isinstance(held.get(v), types.ModuleType)}
    words = [word for word, item in _LOOKING_UP.items() if id(item) in found]
    if "import_module" not in {*words, *given} and "import_module" in names_in(code):
        words.append("import_module")
    return sorted(words)
