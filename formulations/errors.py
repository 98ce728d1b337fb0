"""What can go wrong while a problem is stated or stored.

FormulationError
├── InvalidProblemError   (ValueError)  the numbers or names do not make a problem
├── InfeasibleBudgetError (ValueError)  a budget lies below the smallest use any choice can have
├── EncodingError         (ValueError)  the problem cannot be put into the form that was asked for
└── FileFormatError       (ValueError)  a file is not what it should be (cut short, another kind, a pickle)
"""

from typing import Any


class FormulationError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidProblemError(FormulationError, ValueError):
    """The numbers or names do not make a problem."""


class InfeasibleBudgetError(FormulationError, ValueError):
    """A budget lies below the smallest use that any choice can have. ``problem`` is whose, where it was stated."""

    problem: Any = None


class EncodingError(FormulationError, ValueError):
    """The problem cannot be put into the form that was asked for."""


class FileFormatError(FormulationError, ValueError):
    """A file is not what it should be."""
