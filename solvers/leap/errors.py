"""Errors in the communication with the Leap service.

LeapError (SolverError)
├── LeapTokenError       (PermissionError)  there is no API token, or the service does not accept it
├── LeapSolverError      (LookupError)      the account has no such solver, or it does not accept this kind of problem
├── LeapConnectionError  (ConnectionError)  the service cannot be reached, or failed; try again later
├── LeapQuotaError       (RuntimeError)     the service accepts no more problems: quota or rate limit
└── LeapProblemError     (RuntimeError)     the problem was refused, failed or was cancelled at the service

If a problem is too large or its time limit too short, an `UnsupportedProblemError` is raised before anything is sent.
"""

from solvers.errors import SolverError


class LeapError(SolverError):
    """Base class of errors in the communication with the service."""


class LeapTokenError(LeapError, PermissionError):
    """There is no API token, or the service does not accept it."""


class LeapSolverError(LeapError, LookupError):
    """The account has no such solver, or it does not accept this kind of problem."""


class LeapConnectionError(LeapError, ConnectionError):
    """The service cannot be reached, or failed."""


class LeapQuotaError(LeapError, RuntimeError):
    """The service accepts no more problems for now."""


class LeapProblemError(LeapError, RuntimeError):
    """The problem was refused, failed or was cancelled at the service."""
