"""Numbers as given by callers: Python or numpy numbers, or a tensor or array with one element."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from qcompress.errors import OptionsError


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


def plain(value: Any) -> Any:
    """Return the Python number in a scalar of numpy or torch; anything else unchanged."""
    single = isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0)
    return value.item() if single else value
