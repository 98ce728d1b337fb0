"""Plain arguments as given by callers: numbers of Python or numpy, or with one element; booleans, callbacks, paths."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from formulations.files import AnyPath, missing_folder
from qcompress.errors import DataError, OptionsError

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


def as_seed(value: Any) -> int:
    """Return a seed, which PyTorch's generators take as a number below 2⁶³.

    Raises:
        OptionsError: ``value`` is not a whole number from 0 to 2⁶³ - 1.

    >>> as_seed(np.int64(3))
    3
    """
    seed = as_whole(value, "seed", least=0)
    if seed >= 2**63:
        raise OptionsError(f"seed must be below 2**63, found {value!r}")
    return seed


def as_flag(value: Any, name: str) -> bool:
    """Return a boolean; accept nothing else.

    Raises:
        OptionsError: ``value`` is not a boolean.

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


def as_cache_file(cache: AnyPath | None) -> Path | None:
    """Return the path of a file from which an interrupted call resumes; None for no such file.

    Raises:
        DataError: the path is a folder, or in a folder that does not exist.

    >>> as_cache_file("sums.npz").name
    'sums.npz'
    """
    if cache is None:
        return None
    file = Path(cache)
    if file.is_dir():
        raise DataError(f"the cache of a model in memory is a file, and {str(cache)!r} is a folder: name another path")
    if (folder := missing_folder(file)) is not None:
        raise DataError(f"there is no folder {str(folder)!r} for the cache {file.name}")
    return file


def plain(value: Any) -> Any:
    """Return the Python number in a scalar of numpy or torch; anything else unchanged."""
    single = isinstance(value, np.generic) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 0)
    return value.item() if single else value
