"""Explain why no choice is within the budgets: which budgets conflict, and which would be enough."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

from formulations import Problem
from qcompress.cli.console import print_json, say_lines


def explain(problem: Problem, known: dict[str, Any] | None = None, *, as_json: bool) -> None:
    """Print the explanation as lines on stderr, or with ``known`` values as JSON on stdout under ``infeasibility``.

    There is none of budgets with pair terms, for which the message of the error must do.
    """
    from formulations import explain_infeasibility

    with stdout_to_stderr():  # scipy's HiGHS occasionally prints a line to stdout
        why = None if problem.paired_budgets else explain_infeasibility(problem)
    if as_json:
        print_json({**(known or {}), "infeasibility": None if why is None else why.to_json()})
    elif why is not None:
        say_lines(*str(why).splitlines())


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Redirect what compiled libraries print on stdout to stderr inside the block."""
    _flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(saved, 1)
        os.close(saved)


def _flush() -> None:
    sys.stdout.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
