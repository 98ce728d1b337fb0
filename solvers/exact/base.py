"""Common parts of exact back ends, which solve only the part that a bound and a good choice leave open."""

import contextlib
from collections.abc import Iterator

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import MAX_PRODUCTS, num_products
from formulations.reductions.restriction import Restriction
from solvers.base import Search, Solver
from solvers.bounds.warm import warm_bounds
from solvers.errors import SolverError
from solvers.heuristic.lagrangian import begin, certify, open_part
from solvers.kernels.local_search import polish

TIGHT = 0.01
"""Relative gap up to which branch and bound starts at once, since it then often ends before a semidefinite bound."""


class Exact(Solver):
    """Base class of back ends that begin with `undecided`."""

    exact = True

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_bounds()


class Linearised(Exact):
    """Base class of exact back ends with a separate variable for every product of options."""

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with too many products of options."""
        if (count := num_products(problem)) <= MAX_PRODUCTS:
            return ""
        return (
            f"solver {self.name!r} linearises up to {MAX_PRODUCTS:,} products of options, this problem has {count:,}; "
            "use 'auto', 'lagrangian' or 'anneal'"
        )


class OutOfTimeError(Exception):
    """The building of a model took longer than the time limit, or would take longer; the message says which."""


def require_time(search: Search, seconds: float = 0.0) -> None:
    """End the building of a model, in a block of `recovering`, when the time is over or ends within ``seconds``.

    Raises:
        OutOfTimeError: the time is over, or less than ``seconds`` are left.
    """
    if search.expired():
        raise OutOfTimeError("building the model took longer than the time limit")
    if seconds and search.remaining() < seconds:
        raise OutOfTimeError("building the model would take longer than the time limit")


def linearised_s(problem: Problem, seconds_per_variable: float, seconds_per_use: float) -> float:
    """Estimate the time in seconds to build a linear model, from its options and products, and uses in its budgets."""
    uses = sum(int(np.count_nonzero(problem.resources[name])) for name in problem.budgets)
    return (problem.num_options + num_products(problem)) * seconds_per_variable + uses * seconds_per_use


@contextlib.contextmanager
def recovering(search: Search) -> Iterator[None]:
    """Run a ``with`` block of external code; if it fails or has no time, the run ends with the best choice so far.

    Raises:
        SolverError: no choice was found before the error.
    """
    try:
        yield
    except SolverError:
        raise
    except OutOfTimeError as error:
        search.details["stopped"] = str(error)
        search.cut_short()
    except Exception as error:
        search.recover(error)


def undecided(problem: Problem, search: Search) -> Restriction | None:
    """Compute bounds and a good choice, and return the groups still undecided; None if it is solved or time is up.

    The semidefinite bound of `certify` is for problems whose dual bound is loose.
    """
    begin(problem, search)
    if not problem.pairs and search.choice is not None and not (search.proven() or search.expired()):
        search.offer(polish(problem, search.choice, search.remaining()))
    part = open_part(problem, search) if search.gap <= TIGHT else certify(problem, search)
    return None if search.proven() or search.expired() else part
