"""Results of bounds that are stored with a search, so that later solvers of the same run can use them."""

from dataclasses import dataclass, replace
from typing import Any

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


def learn(search: Search, **results: Any) -> None:
    """Store results, by their names in `Learned`."""
    search.learn(replace(learned(search), **results))


def learn_option_bounds(search: Search, at_least: Floats) -> None:
    """Store proven bounds ``(V,)`` of single options, where they improve the known ones."""
    known = learned(search).at_least
    learn(search, at_least=at_least if known is None else np.maximum(known, at_least))
