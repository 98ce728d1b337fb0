"""What bounds teach about a problem, kept with its search so that later solvers of the run build on it."""

from dataclasses import dataclass, replace

import numpy as np

from formulations import Problem
from solvers.bounds.dual import Ascent, DualBound
from solvers.kernels.moves import Floats
from solvers.search import Search


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """What is known beyond the best bound.

    Attributes:
        dual: a problem and its dual bound, where more time would not improve it.
        ascent: a problem and where the search for its dual bound stands, where time cut it.
        at_least: ``(V,)`` a choice that takes option v and is better than the incumbent has an objective of at least
            ``at_least[v]``.
        certified: number of options of the part that the semidefinite bound was last computed for.
        searched: an objective, and how many options with the lowest bounds were searched without finding a better one.
    """

    dual: tuple[Problem, DualBound] | None = None
    ascent: tuple[Problem, Ascent] | None = None
    at_least: Floats | None = None
    certified: int = 0
    searched: tuple[float, int] = (np.inf, 0)


def learned(search: Search) -> Learned:
    """What this search has been taught so far."""
    return search.learned(Learned) or Learned()


def learn_dual(search: Search, problem: Problem, bound: DualBound) -> None:
    """Keep a dual bound, so that none is computed twice."""
    search.learn(replace(learned(search), dual=(problem, bound)))


def learn_ascent(search: Search, problem: Problem, ascent: Ascent) -> None:
    """Keep where the search for a dual bound stands."""
    search.learn(replace(learned(search), ascent=(problem, ascent)))


def learn_option_bounds(search: Search, at_least: Floats) -> None:
    """Keep proven bounds of single options ``(V,)``, where they are better than those known."""
    known = learned(search)
    best = at_least if known.at_least is None else np.maximum(known.at_least, at_least)
    search.learn(replace(known, at_least=best))


def learn_certified(search: Search, num_options: int) -> None:
    """Keep how many options were open when the semidefinite bound was computed."""
    search.learn(replace(learned(search), certified=num_options))


def learn_searched(search: Search, objective: float, num_options: int) -> None:
    """Keep that so many options with the lowest bounds were searched without finding better than ``objective``."""
    search.learn(replace(learned(search), searched=(objective, num_options)))
