"""What can go wrong while a problem is solved.

SolverError
├── UnknownSolverError      (ValueError)   no solver has that name; the known ones are listed
├── InvalidOptionError      (ValueError)   an option the solver does not have, or a value it cannot take
├── UnsupportedProblemError (ValueError)   the solver cannot take this kind or size of problem; says which can
└── SolverUnavailableError  (ImportError)  a package is missing; says what to install

A budget that no choice can meet is refused before any solver runs: `formulations.InfeasibleBudgetError`.
"""


class SolverError(Exception):
    """Base of every error this package raises on purpose."""


class UnknownSolverError(SolverError, ValueError):
    """No solver has that name."""


class InvalidOptionError(SolverError, ValueError):
    """An option the solver does not have, or a value it cannot take."""


class UnsupportedProblemError(SolverError, ValueError):
    """The solver cannot take this kind or size of problem."""


class SolverUnavailableError(SolverError, ImportError):
    """A package that the solver needs is missing."""
