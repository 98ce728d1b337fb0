"""What goes into a digest of functions, classes and modules.

Code of the user counts by its instructions and constants, with everything that it takes by a name: defaults, variables
that it closes over, globals and attributes of modules. Code of Python or of an installed package counts by its name and
the edition of the package.
"""

import dis
import functools
import importlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum, Flag
from typing import Any

from qcompress.digests.hashing import Digest, Parts, of_items, of_named
from qcompress.digests.libraries import edition_of, is_library, is_library_file, is_library_module, module_of

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(...)})
"""Kinds of values that are known by their text."""

_READING_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_READING = {*_READING_GLOBALS, "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "LOAD_ATTR"}
_BY_TEXT = {"globals", "eval", "exec", "__import__", "open"}
"""Builtins that find what only a run of the code shows."""

_FINDING = {"import_module": importlib.import_module, "environ": os.environ, "getenv": os.getenv}
"""What finds such values in libraries."""

_ANY_ATTRIBUTE = {"getattr", "vars", "__dict__"}
"""Names by which code takes attributes of modules that it does not name."""

_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
_METHODS = (staticmethod, classmethod, property, functools.cached_property, functools.partialmethod)
_OF_ENUMERATIONS = frozenset(vars(Flag("Made", ()))) - {"_boundary_"}
"""Attributes that Python sets in enumerations; members are in one of them, and are added apart."""

_MADE_BY_LIBRARIES = {"_abc_impl", "_backward_cls", "_autograd_function_id"}
"""Attributes that Python and PyTorch set in classes; some are counters."""


def of_function(digest: Digest, value: types.FunctionType, name: str) -> Parts:
    """Yield what a function is made of and what it takes by a name."""
    if is_library(value):  # for example the inner function of a decorator around a user's function
        _put_library_function(digest, value)
        if "<locals>" in value.__code__.co_qualname:
            yield from of_items(digest, "defaults", (value.__defaults__, value.__kwdefaults__), name)
        yield from of_named(digest, _closed_over(value), name)
        yield from of_named(digest, {key: item for key, item in vars(value).items() if key != "_clear_cache"}, name)
        return
    digest.put("function", value.__qualname__)
    yield _without_text(value), name
    yield from of_items(digest, "defaults", (value.__defaults__, value.__kwdefaults__), name)
    yield from of_named(digest, vars(value), name)
    code, words = value.__code__, names_in(value.__code__)
    read = globals_read(code)
    taken = _closed_over(value) | {word: value.__globals__[word] for word in read if word in value.__globals__}
    for word in sorted(_finding_by_text(code, words, taken)):
        digest.unchecked[f"{name}.{word}: what it finds when it runs"] = None
    taken = {word: item for word, item in taken.items() if item is not os.environ}
    for imported in sorted(imports_of(code, value.__globals__.get("__package__"))):
        digest.put("import", imported)
        found = {place: sys.modules.get(place) for place in _with_packages(imported)}
        taken |= {place: each for place, each in found.items() if each and not is_library_module(each, place)}
        if imported not in sys.modules and not _is_installed(imported.partition(".")[0]):  # nothing is imported here
            digest.unchecked[f"{name}.{imported}: module that is not imported yet"] = None
    digest.put("taken", sorted(taken))
    passed = _passed_on(code)
    for word, item in sorted(taken.items()):
        if isinstance(item, types.ModuleType) and word not in passed:
            yield from _of_attributes_read(digest, item, words, passed, f"{name}.{word}")
        else:
            yield item, f"{name}.{word}"


def of_code(digest: Digest, value: types.CodeType, name: str) -> Parts:
    """Put the instructions, names and arguments of code, and yield its constants."""
    arguments = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
    variables = (value.co_varnames, value.co_freevars, value.co_cellvars)
    digest.put("code", value.co_code, value.co_names, value.co_exceptiontable, arguments, variables)
    return of_items(digest, "constants", value.co_consts, name)


def of_class(digest: Digest, value: type, name: str) -> Parts:
    """Yield what a class of the user is made of, or what users have put into a class of a library."""
    if is_library(value):
        digest.put("class", module_of(value), value.__qualname__, edition_of(module_of(value)))
        own = {key: item for key, item in vars(value).items() if _is_own_function(item)}
        yield from of_named(digest, own, name)
        yield from of_items(digest, "bases", [base for base in value.__mro__[1:] if not is_library(base)], name)
        return
    digest.put("class", value.__qualname__)
    yield from of_items(digest, "made by and of", (type(value), *value.__bases__), name)
    made = _MADE_BY_LIBRARIES
    if issubclass(value, Enum):
        made = made | _OF_ENUMERATIONS | set(value._member_map_)
        yield dict(value._member_map_), name
    kept = {key: item for key, item in vars(value).items() if key not in made and not isinstance(item, _DESCRIPTORS)}
    kept = {key: item for key, item in kept.items() if _is_method(item) or not _is_pythons(key)}
    yield from of_named(digest, {key: _inside(item) for key, item in kept.items()}, name)


def of_module(digest: Digest, value: types.ModuleType, name: str) -> Parts:
    """Yield what a module of the user gives to code that may take anything from it."""
    digest.put("module", value.__name__)
    if not is_library_module(value, value.__name__):
        held = {key: item for key, item in vars(value).items() if _is_method(item) or not _is_pythons(key)}
        yield from of_named(digest, held, name)


def names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals, attributes and modules in a function's code and in the functions defined within it.

    >>> def run(net):
    ...     return print(net.out)
    >>> sorted(names_in(run.__code__)), globals_read(run.__code__)
    (['out', 'print'], {'print'})
    """
    return {name for each in _with_inner(code) for name in each.co_names}


def globals_read(code: types.CodeType) -> set[str]:
    """Return the names of globals and builtins that code reads; attributes may have the same names."""
    return {step.argval for each in _with_inner(code) for step in _steps(each) if step.opname in _READING_GLOBALS}


def imports_of(code: types.CodeType, package: str | None) -> set[str]:
    """Return the full names of the modules that code in a package imports when it runs.

    >>> def run():
    ...     import os.path
    ...     from .helpers import SCALE
    >>> sorted(imports_of(run.__code__, "project"))
    ['os.path', 'project.helpers']
    """
    found = set()
    for each in _with_inner(code):
        steps = _steps(each)
        for level, step in zip(steps, steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                found.add(_resolved("." * level.argval + step.argval, package))
    return found


def _finding_by_text(code: types.CodeType, words: set[str], taken: Mapping[str, Any]) -> set[str]:
    """Return the names by which code finds values, modules or files that only its run shows."""
    found = (globals_read(code) & _BY_TEXT) - taken.keys()
    found |= {word for word, item in _FINDING.items() if word in words or any(item is each for each in taken.values())}
    pairs = {(first.argval, second.argval) for each in _with_inner(code) for first, second in _pairs(each)}
    return found | ({"sys.modules"} if ("sys", "modules") in pairs else set())


def _passed_on(code: types.CodeType) -> set[str]:
    """Return the names of globals, closed-over variables and attributes that code does not only take attributes of.

    >>> def run(name):
    ...     return torch.relu, getattr(helpers, name)
    >>> sorted(_passed_on(run.__code__))
    ['getattr', 'helpers', 'relu']
    """
    return {
        first.argval
        for each in _with_inner(code)
        for first, second in _pairs(each)
        if first.opname in _READING and second.opname not in ("LOAD_ATTR", "LOAD_METHOD")
    }


def _resolved(name: str, package: str | None) -> str:
    try:
        return importlib.util.resolve_name(name, package)
    except (ImportError, ValueError):  # beyond the package
        return name


def _with_packages(module: str) -> Iterator[str]:
    parts = module.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _is_installed(package: str) -> bool:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    origin = None if found is None else found.origin
    return origin in ("built-in", "frozen") or (origin is not None and is_library_file(origin))


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


@functools.lru_cache(maxsize=128)  # as the same code is read for globals and for imports
def _steps(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG")


def _pairs(code: types.CodeType) -> Iterator[tuple[dis.Instruction, dis.Instruction]]:
    return itertools.pairwise(_steps(code))


def _put_library_function(digest: Digest, value: types.FunctionType) -> None:
    """Put where the code of a function is from, as `functools.wraps` gives it the names of another one."""
    origin, code = value.__globals__.get("__name__") or "", value.__code__
    digest.put("function", origin, code.co_qualname, edition_of(origin))
    if not code.co_filename.startswith("<"):
        digest.put(code.co_firstlineno, code.co_code, code.co_names)  # which tell lambdas apart


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    """Return the variables of a function's closure that are bound."""
    found = {}
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[variable] = cell.cell_contents
        except ValueError:
            continue
    if function.__globals__ is vars(functools):  # of `functools.singledispatch`: what was met, and a counter
        found = {key: item for key, item in found.items() if key not in ("cache_token", "dispatch_cache")}
    return found


def _of_attributes_read(
    digest: Digest, module: types.ModuleType, words: set[str], passed: set[str], name: str
) -> Parts:
    """Yield the attributes that are taken from a module of the user, and from the user's modules in it."""
    waiting, met = [(module, name)], set()
    while waiting:
        place, called = waiting.pop()
        digest.put("module", place.__name__)
        if place in met or is_library_module(place, place.__name__):
            continue
        met.add(place)
        if words & _ANY_ATTRIBUTE:
            yield place, called
            continue
        for word in sorted((words | {"__getattr__"}) & vars(place).keys()):
            item = vars(place)[word]
            if isinstance(item, types.ModuleType) and word not in passed:
                waiting.append((item, f"{called}.{word}"))
            else:
                digest.put(word)
                yield item, f"{called}.{word}"


def _without_text(function: types.FunctionType) -> types.CodeType:
    """Return the code of a function without its documentation."""
    code = function.__code__
    if code.co_name == "<lambda>" or function.__doc__ is None or code.co_consts[:1] != (function.__doc__,):
        return code
    return code.replace(co_consts=(None, *code.co_consts[1:]))


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, _METHODS)


def _is_own_function(value: Any) -> bool:
    function = _inside(value)
    return isinstance(function, types.FunctionType) and not is_library(function)


def _inside(value: Any) -> Any:
    """Return the functions of a method, property or cached property, with what says which of them it is."""
    if isinstance(value, (staticmethod, classmethod)):
        return [type(value), value.__func__]
    if isinstance(value, property):
        return [type(value), value.fget, value.fset]
    return [type(value), value.func] if isinstance(value, functools.cached_property) else value


def _is_pythons(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")
