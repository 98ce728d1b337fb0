"""Common parts of exact back ends, which solve only the part that a bound and a good choice leave open."""

import contextlib
from collections.abc import Iterator

from formulations import Problem
from formulations.forms.integer_program import MAX_PRODUCTS, num_products
from formulations.reductions.restriction import Restriction
from solvers.base import Search, Solver
from solvers.bounds.warm import warm_bounds
from solvers.errors import SolverError
from solvers.heuristic.lagrangian import begin, certify, open_part
from solvers.kernels.local_search import polish

TIGHT = 0.01
"""Relative gap up to which branch and bound starts at once: it then ends before a semidefinite bound would."""


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
    """The time was over before a model was built."""


def require_time(search: Search) -> None:
    """End the building of a model, in a block of `recovering`, when the time is over.

    Raises:
        OutOfTimeError: the time is over.
    """
    if search.expired():
        raise OutOfTimeError


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
    except OutOfTimeError:
        search.details["stopped"] = "building the model took longer than the time limit"
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
