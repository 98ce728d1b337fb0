"""Errors raised while a problem is built, encoded or stored.

FormulationError
├── InvalidProblemError   (ValueError)  the numbers or names do not make a valid problem
├── InfeasibleBudgetError (ValueError)  no choice meets a budget, or the budgets and a limit on the objective
├── EncodingError         (ValueError)  the problem cannot be converted to the requested form
└── FileFormatError       (ValueError)  a file is truncated, of another kind, or contains a pickle
"""

from typing import Any


class FormulationError(Exception):
    """Base class of every error this package raises on purpose."""


class InvalidProblemError(FormulationError, ValueError):
    """The numbers or names do not make a valid problem."""


class InfeasibleBudgetError(FormulationError, ValueError):
    """No choice meets a budget, or all budgets and a limit on the objective.

    Attributes:
        problem: the problem with these budgets, or None if the code that raised the error did not give it.
    """

    problem: Any = None


class EncodingError(FormulationError, ValueError):
    """The problem cannot be converted to the requested form."""


class FileFormatError(FormulationError, ValueError):
    """A file is truncated, damaged, or not of the expected kind or version."""
