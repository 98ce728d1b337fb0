"""The conformance suite for back ends: plain functions that you can run on your own solver.

    from solvers.testing import check_solver
    check_solver(MySolver)                      # a class, an instance, a registered name or any dimod sampler

Each ``checks.check_…(solver)`` tests one behaviour and raises `ConformanceError` with the expected and the actual
result and the problem. `checks_for` selects the checks by the solver's declarations (``exact``, ``native_pairs``,
``deterministic``, ``honours_time_limit``), so a test suite can run them one by one. Answers are compared with an
enumeration of all choices by `Problem.evaluate`. An answer without a choice never passes if a feasible choice exists.
"""

import logging

from solvers.base import SolverLike
from solvers.errors import SolverUnavailableError
from solvers.run import as_solver
from solvers.testing import checks
from solvers.testing.judge import ConformanceError, optimum

__all__ = ["ConformanceError", "check_solver", "checks_for", "optimum"]


logger = logging.getLogger(__name__)


def check_solver(solver: SolverLike) -> tuple[str, ...]:
    """Run every check that applies to ``solver``.

    Args:
        solver: a registered name, a `Solver` class or instance, or a dimod sampler.

    Returns:
        Names of the checks that were run, all of which passed.

    Raises:
        ConformanceError: a check failed; the message lists all failures.
        SolverUnavailableError: a package that the solver needs is missing.

    >>> "check_interrupt_keeps_the_best" in check_solver("brute-force")
    True
    """
    back_end = as_solver(solver)
    if why := back_end.why_not():
        raise SolverUnavailableError(why)
    suite = checks_for(back_end)
    failures: list[str] = []
    first: Exception | None = None
    for number, check in enumerate(suite, start=1):
        logger.info("%s: %d of %d, %s", back_end.name, number, len(suite), check.__name__)
        try:
            check(back_end)
        except Exception as error:  # any exception counts as a failure; the other checks still run
            message = str(error) if isinstance(error, ConformanceError) else f"raised {error!r}"
            failures.append(f"{check.__name__}: {message}")
            first = first or error
    if failures:
        lines = "\n  ".join(failures)
        summary = f"{len(failures)} of {len(suite)} checks failed for {back_end.name!r}"
        raise ConformanceError(f"{summary}:\n  {lines}") from first
    return tuple(check.__name__ for check in suite)


def checks_for(solver: SolverLike) -> tuple[checks.Check, ...]:
    """Return the checks that apply to a solver according to its declarations."""
    back_end = as_solver(solver)
    optional = (
        (checks.check_equals_brute_force, back_end.exact),
        (checks.check_pair_terms_are_refused, not back_end.native_pairs),
        (checks.check_time_limit, back_end.honours_time_limit),
        (checks.check_same_seed_same_answer, back_end.deterministic),
        (checks.check_scale_changes_no_choice, back_end.deterministic),
    )
    return (*checks.ALWAYS, *(check for check, applies in optional if applies))
