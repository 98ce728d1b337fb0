"""Proven lower bounds by Lagrangian duality, with a price for every budget.

Three kinds of coupling are relaxed, each with multipliers of its own:

* a budget ``use·x ≤ B`` with a price λ ≥ 0;
* the factor: with ``z = Fᵀx`` as its own variable, ``½‖z‖² - y·(z - Fᵀx)`` is least at ``z = y``, so that y needs only
  r numbers (a group pairs never with itself, hence the cost ``cost - ½‖F_v‖²``);
* a block S_gh of sparse terms between two groups: messages ``a`` and ``b`` move parts of it to the options of g and h
  (the dual of the local polytope; Werner, doi:10.1109/TPAMI.2007.1036).

What is left splits by group and by block,

    d(λ, y, a, b) = Σ_g min_{v∈g} (cost'_v + λ·use_v + y·F_v + Σ a_v) + Σ_gh min_{u,v} (S_uv - a_u - b_v) - λ·B - ½‖y‖²

and every value of this concave function is a lower bound. Linear problems: exact for one budget (by the slopes of the
groups' convex hulls), by the LP's prices for several. With a factor: L-BFGS on softmin in place of min, with a falling
temperature. With blocks: sequential message passing, and a line search for the prices. However the multipliers were
found, the bound that is returned is d itself, with true minima.
"""

import time

from formulations import Problem
from solvers.bounds.dual import Ascent, Dual, DualBound, largest_objective
from solvers.bounds.learned import learn_ascent, learn_dual, learn_option_bounds, learned
from solvers.search import Search

__all__ = ["DualBound", "dual_bound", "largest_objective", "raise_dual_bound"]


def dual_bound(problem: Problem, *, time_limit: float = float("inf")) -> DualBound:
    """The best Lagrangian bound that is found in ``time_limit`` seconds (any time gives a valid one).

    Without a feasible choice the bound may be as large as the largest objective of any choice, or larger.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> bound = dual_bound(problem)
    >>> round(bound.value, 9), bound.prices
    (1.0, {'bytes': 0.25})
    """
    return _ascend(problem, time_limit, None)[0]


def _ascend(problem: Problem, time_limit: float, begun: Ascent | None) -> tuple[DualBound, Ascent | None]:
    """The bound, and where the search for it stands (linear problems are done at once)."""
    dual, deadline = Dual(problem), time.perf_counter() + time_limit
    if not problem.pairs:
        return dual.bound(dual.linear_prices(deadline)), None
    ascent = dual.ascend(deadline, begun)
    return dual.bound(ascent.point), ascent


def raise_dual_bound(problem: Problem, search: Search, share: float) -> DualBound:
    """Hand the dual bound and its prices to a search; at most ``share`` of its remaining time is taken.

    A search for the bound that an earlier time limit cut goes on from there. A bound that no choice can meet closes
    the search: nothing is feasible.
    """
    known = learned(search)
    if known.dual is not None and known.dual[0] is problem:
        return known.dual[1]
    begun = None if known.ascent is None or known.ascent[0] is not problem else known.ascent[1]
    with search.phase("bound_s"):
        seconds, start = share * search.remaining(), time.perf_counter()
        bound, ascent = _ascend(problem, seconds, begun)
    if time.perf_counter() - start < seconds:  # the time did not cut it, so that another would be no better
        learn_dual(search, problem, bound)
    else:
        search.cut_short()
        if ascent is not None:
            learn_ascent(search, problem, ascent)
    search.raise_bound(bound.value)
    learn_option_bounds(search, bound.value + bound.reduced)
    search.note(prices=bound.prices)
    if bound.value > largest_objective(problem):
        search.close()
    return bound
