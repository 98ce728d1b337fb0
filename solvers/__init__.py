"""Interchangeable solvers for a `formulations.Problem`.

    Problem ──solve(problem, "name")──▶ Solution(choice, objective, bound, gap, status, …)

Back ends are imported when they are used. `solvers.testing.check_solver` is the suite every back end passes.
"""

from solvers.base import Progress, Search, Solver, SolverInfo
from solvers.errors import (
    InvalidOptionError,
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
    "Progress",
    "Search",
    "Solution",
    "Solver",
    "SolverError",
    "SolverInfo",
    "SolverUnavailableError",
    "Status",
    "StopReason",
    "TracePoint",
    "UnknownSolverError",
    "UnsupportedProblemError",
    "available",
    "judge",
    "solve",
]
