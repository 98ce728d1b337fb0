"""What can go wrong between this machine and the Leap service.

LeapError (SolverError)
├── LeapTokenError       (PermissionError)  no API token, or one that the service does not accept
├── LeapSolverError      (LookupError)      the account has no such solver, or it does not take this kind of problem
├── LeapConnectionError  (ConnectionError)  the service cannot be reached, or broke down; try again later
├── LeapQuotaError       (RuntimeError)     the service takes no more problems: quota or rate limit
└── LeapProblemError     (RuntimeError)     the problem was refused, failed or was cancelled at the service

A problem that is too large, or a time limit too short for it, is an `UnsupportedProblemError` before anything is sent.
"""

from solvers.errors import SolverError


class LeapError(SolverError):
    """Base of what goes wrong between this machine and the service."""


class LeapTokenError(LeapError, PermissionError):
    """No API token, or one that the service does not accept."""


class LeapSolverError(LeapError, LookupError):
    """The account has no such solver, or it does not take this kind of problem."""


class LeapConnectionError(LeapError, ConnectionError):
    """The service cannot be reached, or broke down."""


class LeapQuotaError(LeapError, RuntimeError):
    """The service takes no more problems for now."""


class LeapProblemError(LeapError, RuntimeError):
    """The problem was refused, failed or was cancelled at the service."""
