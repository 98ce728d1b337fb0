"""Plain arguments as given by callers: numbers of Python or numpy, or with one element; booleans, callbacks, paths."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from qcompress.errors import OptionsError

PATHS = ("cache", "folder", "output")
"""Keyword arguments that are paths."""


def as_number(value: Any, name: str, *, above: float, wanted: str = "") -> float:
    """Return a finite number above ``above``; ``wanted`` describes valid values in the error message.

    Raises:
        OptionsError: ``value`` is not such a number.

    >>> as_number(np.float32(0.5), "share", above=0)
    0.5
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number <= above:
        raise OptionsError(f"{name} must be {wanted or f'a number above {above:g}'}, found {value!r}")
    return float(number)


def as_whole(value: Any, name: str, *, least: int) -> int:
    """Return a whole number of at least ``least``.

    Raises:
        OptionsError: ``value`` is not such a number.

    >>> as_whole(np.int64(3), "rounds", least=1)
    3
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise OptionsError(f"{name} must be a whole number from {least}, found {value!r}")
    return number


def as_flag(value: Any, name: str) -> bool:
    """Return a boolean; nothing else is taken for one.

    Raises:
        OptionsError: ``value`` is none.

    >>> as_flag(np.True_, "guard")
    True
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise OptionsError(f"{name} must be True or False, found {value!r}")
    return flag


def require_kinds(named: Mapping[str, Any]) -> None:
    """Check that among keyword arguments callbacks (``on_…``) can be called and paths are paths; None is neither.

    Raises:
        OptionsError: one is of another kind.

    >>> require_kinds({"on_progress": print, "cache": None, "folder": "run", "jobs": 2})
    """
    for name, value in named.items():
        if name.startswith("on_") and value is not None and not callable(value):
            raise OptionsError(f"{name} must be a function to call, found {value!r}")
        if name in PATHS and value is not None and not isinstance(value, (str, os.PathLike)):
            raise OptionsError(f"{name} must be a path, found {value!r}")


def plain(value: Any) -> Any:
    """Return the Python number in a scalar of numpy or torch; anything else unchanged."""
    single = isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0)
    return value.item() if single else value
