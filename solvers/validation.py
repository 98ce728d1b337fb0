"""Checks of arguments that several functions take."""

from typing import Any

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
