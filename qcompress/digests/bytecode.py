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
_LOOKING_UP = {"globals", "eval", "exec", "__import__"}
_ASSIGNING = ("STORE_ATTR", "DELETE_ATTR")
_ASSIGNING_ITEMS = ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_INDEXING = ("LOAD_CONST", "LOAD_FAST", "LOAD_SMALL_INT", "BINARY_SUBSCR", "BINARY_OP")
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
    """Return the names of globals and of a closure's variables that code does not only take attributes of.

    >>> def run(nets, name):
    ...     return print.out, getattr(nets, name), getattr(len, name)
    >>> sorted(passed_on(run.__code__))
    ['getattr', 'len']
    """
    return {
        first.argval
        for each in _with_inner(code)
        for first, second in _pairs(each)
        if first.opname in _LOADING_VARIABLES and second.opname not in (*_LOADING, *_ASSIGNING)
    }


def looked_up_by(code: types.CodeType) -> set[str]:
    """Return what code calls or reads to find values or modules by a name that only its run shows.

    >>> def run(name):
    ...     return globals()[name], sys.modules[name], importlib.import_module(name), self.modules()
    >>> sorted(looked_up_by(run.__code__))
    ['globals', 'import_module', 'sys.modules']
    """
    pairs = [pair for each in _with_inner(code) for pair in _pairs(each)]
    modules = {"sys.modules" for first, second in pairs if (first.argval, second.argval) == ("sys", "modules")}
    return modules | (globals_in(code) & _LOOKING_UP) | (names_in(code) & {"import_module"})


def assigned_by(code: types.CodeType) -> set[str]:
    """Return the names of attributes that code assigns or deletes."""
    return _named(code, _ASSIGNING)


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


def functions_in(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield name and function of the methods and properties in the body of a class, without decorators around them."""
    for name, item in vars(kind).items():
        held = [item]
        if isinstance(item, (staticmethod, classmethod)):
            held = [item.__func__]
        elif isinstance(item, property):
            held = [item.fget, item.fset]
        elif isinstance(item, functools.cached_property):
            held = [item.func]
        for each in held:
            function = inspect.unwrap(each) if isinstance(each, types.FunctionType) else None
            if isinstance(function, types.FunctionType):
                yield name, function


def rebound_by(code: types.CodeType) -> set[str]:
    """Return the names of attributes that code may assign or delete, also by their text.

    For texts at the beginning or the end of an f-string there are patterns as well.

    >>> def forward(self, number, x):
    ...     setattr(self, f"seen_{number}", x)
    >>> sorted(rebound_by(forward.__code__))
    ['seen_', 'seen_*']
    """
    found = assigned_by(code)
    for each in _with_inner(code):
        if not _BY_TEXT.isdisjoint(each.co_names):
            found |= {text for text in each.co_consts if isinstance(text, str) and text.isidentifier()}
            found |= _patterns(each)
    return found


def _patterns(code: types.CodeType) -> set[str]:
    """Return patterns of the names that f-strings without a condition in them may give."""
    patterns, before = set(), _instructions(code)
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


def _instructions(code: types.CodeType) -> list[dis.Instruction]:
    """The instructions without those that only lengthen the argument of the next one."""
    return [instruction for instruction in dis.get_instructions(code) if instruction.opname != "EXTENDED_ARG"]


def _pairs(code: types.CodeType) -> Iterator[tuple[dis.Instruction, dis.Instruction]]:
    return itertools.pairwise(_instructions(code))


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
