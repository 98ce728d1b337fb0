"""Results of bounds that are stored with a search, so that later solvers of the same run can use them."""

from dataclasses import dataclass, replace

import numpy as np

from formulations import Problem
from solvers.bounds.dual import Ascent, DualBound
from solvers.kernels.moves import Floats
from solvers.search import Search


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """Results beyond the best bound.

    Attributes:
        dual: a problem and its dual bound, if more time would not improve it.
        ascent: a problem and the state of the search for its dual bound, if the time limit ended it.
        at_least: ``(V,)`` lower bounds by option: a choice that takes option v and is better than the incumbent has an
            objective of at least ``at_least[v]``.
        certified: number of open options when the semidefinite bound was last computed.
        searched: an objective, and the number of options with the smallest bounds that were searched without finding a
            better one.
    """

    dual: tuple[Problem, DualBound] | None = None
    ascent: tuple[Problem, Ascent] | None = None
    at_least: Floats | None = None
    certified: int = 0
    searched: tuple[float, int] = (np.inf, 0)


def learned(search: Search) -> Learned:
    """Return the stored results of this search."""
    return search.learned(Learned) or Learned()


def learn_dual(search: Search, problem: Problem, bound: DualBound) -> None:
    """Store a dual bound, so that it is not computed twice."""
    search.learn(replace(learned(search), dual=(problem, bound)))


def learn_ascent(search: Search, problem: Problem, ascent: Ascent) -> None:
    """Store the state of the search for a dual bound."""
    search.learn(replace(learned(search), ascent=(problem, ascent)))


def learn_option_bounds(search: Search, at_least: Floats) -> None:
    """Store proven bounds ``(V,)`` of single options, where they improve the known ones."""
    known = learned(search)
    best = at_least if known.at_least is None else np.maximum(known.at_least, at_least)
    search.learn(replace(known, at_least=best))


def learn_certified(search: Search, num_options: int) -> None:
    """Store the number of open options when the semidefinite bound was computed."""
    search.learn(replace(learned(search), certified=num_options))


def learn_searched(search: Search, objective: float, num_options: int) -> None:
    """Store that the ``num_options`` options with the smallest bounds contain nothing better than ``objective``."""
    search.learn(replace(learned(search), searched=(objective, num_options)))
