"""Interchangeable solvers for a `formulations.Problem`.

    Problem ──solve(problem, "name")──▶ Solution(choice, objective, bound, gap, status, …)

Back ends, and everything that needs compiled code or another package, are imported on first use.
`solvers.testing.check_solver` is the test suite that every back end passes.
"""

import importlib
from typing import Any

from solvers.base import Progress, Search, Solver, SolverInfo, SolverLike
from solvers.errors import (
    InvalidOptionError,
    NoChoiceError,
    SolverError,
    SolverUnavailableError,
    UnknownSolverError,
    UnsupportedProblemError,
)
from solvers.registry import available
from solvers.run import judge, solve
from solvers.solution import Solution, Status, StopReason, TracePoint

__all__ = [
    "InvalidOptionError",
    "NoChoiceError",
    "Progress",
    "Search",
    "Solution",
    "Solver",
    "SolverError",
    "SolverInfo",
    "SolverLike",
    "SolverUnavailableError",
    "Status",
    "StopReason",
    "TracePoint",
    "UnknownSolverError",
    "UnsupportedProblemError",
    "MultiStart",
    "Polish",
    "available",
    "beam_search",
    "judge",
    "pareto_front",
    "solve",
]

_LATER = {
    "MultiStart": "solvers.composites.multi_start",
    "Polish": "solvers.composites.polish",
    "beam_search": "solvers.beam",
    "pareto_front": "solvers.multi_objective",
}


def __getattr__(name: str) -> Any:
    """Import slow modules on first use."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
