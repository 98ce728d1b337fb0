"""Check the values of a solver's options against the annotations of its fields."""

import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}


@functools.cache
def annotations(solver: type) -> Mapping[str, Any]:
    """Return field → annotation; empty if an annotation names something that is imported for type checkers only."""
    try:
        return typing.get_type_hints(solver)
    except NameError:
        return {}


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the type of an annotation; only the outer type of a collection is checked.

    >>> fits(3, int | None), fits(2.5, int), fits(True, int), fits(3, float), fits("x", Literal["x", "y"])
    (True, False, False, True, True)
    """
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is None:
        return value is None
    if origin in (int, float):
        number = numbers.Integral if origin is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    try:
        return isinstance(value, origin)
    except TypeError:  # Any, type variables, protocols: nothing that can be checked here
        return True


def described(hint: Any) -> str:
    """Describe the values that an annotation allows.

    >>> described(int | None), described(Literal["x", "y"])
    ('a whole number or None', "'x' or 'y'")
    """
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, typing.get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}")
