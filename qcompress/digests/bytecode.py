"""What functions do by name, read from their bytecode: names, attributes that they write, imports.

A name stands for every attribute of this name, whatever object it belongs to: the bytecode does not say which.
"""

import dis
import functools
import inspect
import itertools
import types
from collections import deque
from collections.abc import Iterator, Sequence

_LOADING = ("LOAD_ATTR", "LOAD_METHOD")
_LOADING_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_LOADING_VARIABLES = (*_LOADING_GLOBALS, "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF")
_ASSIGNING = ("STORE_ATTR", "DELETE_ATTR")
_WHOLE = {"__dict__", "__getattribute__", "__getattr__"}
"""Attributes of a module that give any other."""
_ASSIGNING_ITEMS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_INDEXING = ("LOAD_CONST", "LOAD_FAST", "LOAD_SMALL_INT", "BINARY_SUBSCR", "BINARY_OP")
_CHANGING_OPERATORS = {
    "STORE_SUBSCR": ("__setitem__",),
    "STORE_SLICE": ("__setitem__",),
    "DELETE_SUBSCR": ("__delitem__",),
    "STORE_ATTR": ("__setattr__",),
    "DELETE_ATTR": ("__delattr__",),
    "BEFORE_WITH": ("__enter__", "__exit__"),
    "LOAD_SPECIAL": ("__enter__", "__exit__"),
    "BINARY_OP": (
        "__iadd__", "__iand__", "__ifloordiv__", "__ilshift__", "__imatmul__", "__imod__", "__imul__", "__ior__",
        "__ipow__", "__irshift__", "__isub__", "__itruediv__", "__ixor__",
    ),
}  # fmt: skip
"""Methods that change objects, by the instructions that call them; those of `BINARY_OP` only in place."""
CHANGING_OPERATORS = frozenset().union(*_CHANGING_OPERATORS.values())
"""Methods that change objects when code assigns or deletes something in them, or enters them."""
_BY_TEXT = {"setattr", "delattr", "vars", "__dict__", "__setattr__", "__delattr__"}
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_CHANGING = {"fill"}.union(*(vars(kind) for kind in (list, dict, set, deque))) - {"get"}.union(
    *(vars(kind) for kind in (object, tuple, frozenset, types.MappingProxyType))
)
"""Methods of containers and arrays that may change them; those of tensors end in an underscore."""


def names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes in a function's code and in the functions defined within it."""
    return {name for each in _with_inner(code) for name in each.co_names}


def globals_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and builtins that code reads; attributes may have the same names.

    >>> def run(net):
    ...     return print(net.out)
    >>> sorted(globals_in(run.__code__)), sorted(names_in(run.__code__))
    (['print'], ['out', 'print'])
    """
    return _named(code, _LOADING_GLOBALS)


def passed_on(code: types.CodeType) -> set[str]:
    """Return the names of variables, attributes and imports that code does not only take attributes of.

    >>> def run(name):
    ...     import os.path as place
    ...     return print.out.end, name.first, getattr(place, name)
    >>> sorted(passed_on(run.__code__))
    ['end', 'first', 'getattr', 'name', 'path', 'place']
    """
    found = {
        first.argval
        for each in _with_inner(code)
        for first, second in itertools.pairwise(item for item in _instructions(each) if item.opname != "COPY")
        if (first.opname in _LOADING or _is_variable(first))
        and (second.opname not in (*_LOADING, *_ASSIGNING) or second.argval in _WHOLE)
    }
    return found | {taken or module for module, taken, variable in bound_by_imports(code) if variable in found}


def bound_by_imports(code: types.CodeType) -> list[tuple[str, str, str]]:
    """Return module, name in it (empty for the module or its package) and variable of what imports bind.

    >>> def run():
    ...     import os.path, sys as system
    ...     from .helpers import SCALE as scale
    >>> bound_by_imports(run.__code__)
    [('os.path', '', 'os'), ('sys', '', 'system'), ('helpers', 'SCALE', 'scale')]
    """
    found = []
    for each in _with_inner(code):
        module, taken = "", None
        for instruction in _instructions(each):
            if instruction.opname == "IMPORT_NAME":
                module, taken = instruction.argval, ""
            elif instruction.opname == "IMPORT_FROM":
                taken = instruction.argval
            elif instruction.opname.startswith("STORE_") and taken is not None:
                found.append((module, taken, instruction.argval))
                taken = None
    return found


def attributes_in(code: types.CodeType) -> set[tuple[str, str]]:
    """Return the variables that code reads, each with the attribute that it takes of it (empty if none).

    >>> def run(name):
    ...     return sys.modules[name]
    >>> sorted(attributes_in(run.__code__))
    [('name', ''), ('sys', 'modules')]
    """
    return {
        (first.argval, second.argval if second.opname in _LOADING else "")
        for each in _with_inner(code)
        for first, second in itertools.pairwise(_instructions(each))
        if _is_variable(first)
    }


@functools.lru_cache(maxsize=4096)
def assigned_by(code: types.CodeType) -> frozenset[str]:
    """Return the names of attributes that code assigns or deletes."""
    return frozenset(_named(code, _ASSIGNING))


def written_by(code: types.CodeType) -> set[str]:
    """Return the names of attributes that code may assign, delete, or change by an item, an operator or a method.

    In a line that assigns an item, all attributes count. Changes through another name of the same object are not found.

    >>> def forward(self, x):
    ...     self.seen.append(self.scale * x)
    ...     self.calls += 1
    ...     self.cache[x.shape] = x
    >>> sorted(written_by(forward.__code__))
    ['cache', 'calls', 'seen', 'shape']
    """
    return rebound_by(code).union(*map(_changed, _with_inner(code)))


def changing_operators_in(code: types.CodeType) -> set[str]:
    """Return the methods of `CHANGING_OPERATORS` that code may call, also by methods of containers.

    >>> def run(cache, key, total):
    ...     cache[key] = total
    >>> changing_operators_in(run.__code__)
    {'__setitem__'}
    """
    found: set[str] = set()
    for each in _with_inner(code):
        for instruction in _instructions(each):
            if instruction.opname != "BINARY_OP" or instruction.argrepr.endswith("="):
                found.update(_CHANGING_OPERATORS.get(instruction.opname, ()))
    names = names_in(code)
    if not _CHANGING.isdisjoint(names):
        found |= {"__setitem__", "__delitem__"}
    if not _BY_TEXT.isdisjoint(names):
        found |= {"__setattr__", "__delattr__"}
    return found


def imports_of(code: types.CodeType) -> set[tuple[int, str]]:
    """Return the level (0 if absolute) and name of every module that code imports when it runs.

    >>> def run():
    ...     import os.path
    ...     from .helpers import SCALE
    >>> sorted(imports_of(run.__code__))
    [(0, 'os.path'), (1, 'helpers')]
    """
    found = set()
    for each in _with_inner(code):
        listed = _instructions(each)
        for level, instruction in zip(listed, listed[2:], strict=False):
            if instruction.opname == "IMPORT_NAME":
                found.add((level.argval, instruction.argval))
    return found


def cached_in(kind: type) -> set[str]:
    """Return the names of the cached properties in the body of a class, which are kept as attributes of its objects."""
    return {name for name, item in vars(kind).items() if isinstance(item, functools.cached_property)}


def functions_in(kind: type, *, setters: bool = True) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield name and function of the methods and properties in a class's body, also without decorators around them."""
    for name, item in vars(kind).items():
        held = [item]
        if isinstance(item, (staticmethod, classmethod)):
            held = [item.__func__]
        elif isinstance(item, property):
            held = [item.fget, item.fset if setters else None]
        elif isinstance(item, functools.cached_property):
            held = [item.func]
        for each in held:
            if isinstance(each, types.FunctionType):
                yield from ((name, one) for one in {each, inspect.unwrap(each)} if isinstance(one, types.FunctionType))


def rebound_by(code: types.CodeType) -> set[str]:
    """Return the names of attributes that code may assign or delete, also by their text.

    For texts at the beginning or the end of an f-string there are patterns as well.

    >>> def forward(self, number, x):
    ...     setattr(self, f"seen_{number}", x)
    >>> sorted(rebound_by(forward.__code__))
    ['seen_', 'seen_*']
    """
    found = set(assigned_by(code))
    for each in _with_inner(code):
        if not _BY_TEXT.isdisjoint(each.co_names):
            found |= {text for text in each.co_consts if isinstance(text, str) and text.isidentifier()}
            found |= _patterns(each)
    return found


def _patterns(code: types.CodeType) -> set[str]:
    """Return patterns of the names that f-strings without a condition in them may give."""
    patterns, before = set(), list(_instructions(code))
    while before:
        instruction = before.pop()
        if instruction.opname != "BUILD_STRING":
            continue
        height, start = 0, len(before)
        while start and height < instruction.argval:  # back to where the first piece is put on the stack
            start -= 1
            height += dis.stack_effect(before[start].opcode, before[start].arg, jump=False)
        pieces = before[start:]
        if any(piece.opcode in _JUMPS or piece.is_jump_target for piece in pieces):
            continue
        first, last = (piece.argval if piece.opname == "LOAD_CONST" else None for piece in (pieces[0], pieces[-1]))
        if isinstance(first, str) and first.isidentifier():
            patterns.add(f"{first}*")
        if isinstance(last, str) and f"_{last}".isidentifier():
            patterns.add(f"*{last}")
    return patterns


def stored_globals(code: types.CodeType) -> set[str]:
    """Return the names of globals that code assigns."""
    return _named(code, ("STORE_GLOBAL",))


def _named(code: types.CodeType, operations: Sequence[str]) -> set[str]:
    return {
        instruction.argval
        for each in _with_inner(code)
        for instruction in _instructions(each)
        if instruction.opname in operations
    }


@functools.lru_cache(maxsize=128)  # as a function is read in several ways, one after the other
def _instructions(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    """The instructions, without those that only lengthen the next one's argument; two in one (3.13) are separate."""
    found = []
    for each in dis.get_instructions(code):
        if "_FAST" in each.opname and isinstance(each.argval, tuple):
            for kind, name in zip(each.opname.split("_FAST"), each.argval, strict=False):
                single = f"{kind.rpartition('_')[2]}_FAST"
                found.append(each._replace(opname=single, opcode=dis.opmap[single], arg=0, argval=name))
        elif each.opname != "EXTENDED_ARG":
            found.append(each)
    return tuple(found)


def _is_variable(instruction: dis.Instruction) -> bool:
    return instruction.opname in _LOADING_VARIABLES or instruction.opname.startswith("LOAD_FAST")


def _with_inner(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_inner(constant)


@functools.lru_cache(maxsize=4096)
def _changed(code: types.CodeType) -> frozenset[str]:
    found: set[str] = set()
    loaded: dict[int | None, set[str]] = {}
    last = None  # the attribute that is on top of the stack, or an item of it
    lines: set[int | None] = set()
    for instruction in _instructions(code):
        name, line = instruction.opname, instruction.positions.lineno if instruction.positions else None
        if name in _ASSIGNING_ITEMS:
            lines.add(line)
        elif name in _LOADING:
            if last is not None and _changes(instruction.argval):
                found.add(last)
            loaded.setdefault(line, set()).add(instruction.argval)
        if name in _LOADING:
            last = instruction.argval
        elif not name.startswith(_INDEXING):
            last = None
    return frozenset(found.union(*(loaded.get(line, ()) for line in lines)))


def _changes(method: str) -> bool:
    return method in _CHANGING or (method.endswith("_") and not method.startswith("_"))
