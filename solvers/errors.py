"""Errors raised while a problem is solved.

SolverError
├── UnknownSolverError      (ValueError)   no solver has that name; the message lists the known ones
├── InvalidOptionError      (ValueError)   the solver has no such option, or the value is invalid
├── UnsupportedProblemError (ValueError)   the solver does not support this kind or size of problem
├── NoChoiceError           (RuntimeError) the solver found no choice, and did not prove that there is none
└── SolverUnavailableError  (ImportError)  a package is missing; the message says what to install

A budget that no choice can meet is refused before any solver runs, with `formulations.InfeasibleBudgetError`;
`solvers.smallest_use` raises it after a proof that no choice is within the limit on the objective.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from formulations import Problem


class SolverError(Exception):
    """Base class of every error this package raises on purpose."""


class UnknownSolverError(SolverError, ValueError):
    """No solver has that name."""


class InvalidOptionError(SolverError, ValueError):
    """The solver has no such option, or the value of an option is invalid."""


class UnsupportedProblemError(SolverError, ValueError):
    """The solver does not support this kind or size of problem; the message says which solvers do."""


class NoChoiceError(SolverError, RuntimeError):
    """The solver found no choice within the limit on the objective and the budgets of ``problem``."""

    problem: "Problem | None" = None


class SolverUnavailableError(SolverError, ImportError):
    """A package that the solver needs is missing."""


def described(error: BaseException) -> str:
    """Return an error's type and text; external code may raise one whose text cannot be made or encoded.

    >>> described(ValueError("no number"))
    'ValueError: no number'
    """
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as another:  # whatever __str__ raises
        text = f"{type(error).__name__} (its text raises {type(another).__name__})"
    return text.encode(errors="backslashreplace").decode()
