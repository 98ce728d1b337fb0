"""Checks of arguments that several functions take."""

from typing import Any

import numpy as np

from formulations import Problem
from solvers.errors import InvalidOptionError


def require_problem(problem: Any, taker: str) -> None:
    """Check that a function called ``taker`` was given a problem.

    Raises:
        InvalidOptionError: it was given something else, such as the path of a problem's file.
    """
    if not isinstance(problem, Problem):
        raise InvalidOptionError(
            f"{taker} takes a formulations.Problem, found {type(problem).__name__}; Problem.load(path) reads a file"
        )


def as_seed(seed: Any) -> int:
    """Return a random seed as a Python number.

    Raises:
        InvalidOptionError: it is not a whole number from 0.

    >>> as_seed(np.int64(3))
    3
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InvalidOptionError(f"seed must be a whole number from 0, found {seed!r}")
    return int(seed)
