"""Proven lower bounds by Lagrangian duality, with a price for every budget.

Three kinds of coupling are relaxed, each with its own multipliers:

* a budget ``use·x ≤ B`` with a price λ ≥ 0;
* the factor: with a new variable ``z = Fᵀx``, ``½‖z‖² - y·(z - Fᵀx)`` is smallest at ``z = y``, so that y has only r
  numbers (a group has no pair terms with itself, hence the cost ``cost - ½‖F_v‖²``);
* a block S_gh of sparse terms between two groups: messages ``a`` and ``b`` move parts of it to the options of g and h
  (the dual of the local polytope; Werner, doi:10.1109/TPAMI.2007.1036).

The rest splits by group and by block,

    d(λ, y, a, b) = Σ_g min_{v∈g} (cost'_v + λ·use_v + y·F_v + Σ a_v) + Σ_gh min_{u,v} (S_uv - a_u - b_v) - λ·B - ½‖y‖²

and every value of this concave function is a lower bound. Linear problems are solved exactly for one budget (by the
slopes of the groups' convex hulls), and with the LP's prices for several. With a factor, L-BFGS maximises d with
softmin in place of min, at falling temperatures. With blocks, sequential message passing is combined with a line search
for the prices. However the multipliers are found, the returned bound is d itself, with true minima.
"""

import time

from formulations import Problem
from solvers.bounds.dual import Ascent, Dual, DualBound, largest_objective
from solvers.bounds.learned import learn, learn_option_bounds, learned
from solvers.search import Search

__all__ = ["DualBound", "dual_bound", "largest_objective", "raise_dual_bound"]


def dual_bound(problem: Problem, *, time_limit: float = float("inf")) -> DualBound:
    """Compute the best Lagrangian bound found in ``time_limit`` seconds (it is valid for any time limit).

    If no choice is feasible, the bound may reach or exceed the largest objective of any choice.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> bound = dual_bound(problem)
    >>> round(bound.value, 9), bound.prices
    (1.0, {'bytes': 0.25})
    """
    return _ascend(problem, time_limit, None)[0]


def _ascend(problem: Problem, time_limit: float, begun: Ascent | None) -> tuple[DualBound, Ascent | None]:
    """Return the bound and the state of the search for it (None for linear problems, which are solved directly)."""
    dual, deadline = Dual(problem), time.perf_counter() + time_limit
    if not problem.pairs:
        return dual.bound(dual.linear_prices(deadline)), None
    ascent = dual.ascend(deadline, begun)
    return dual.bound(ascent.point), ascent


def raise_dual_bound(problem: Problem, search: Search, share: float) -> DualBound:
    """Report the dual bound and its prices to a search, using at most ``share`` of its remaining time.

    If an earlier time limit ended the search for the bound, it resumes from there. A bound that no choice can meet
    closes the search, because no choice is feasible.
    """
    known = learned(search)
    if known.dual is not None and known.dual[0] is problem:
        return known.dual[1]
    begun = None if known.ascent is None or known.ascent[0] is not problem else known.ascent[1]
    with search.phase("bound_s"):
        seconds, start = share * search.remaining(), time.perf_counter()
        bound, ascent = _ascend(problem, seconds, begun)
    if time.perf_counter() - start < seconds:  # it finished in time, so another run would be no better
        learn(search, dual=(problem, bound))
    else:
        search.cut_short()
        if ascent is not None:
            learn(search, ascent=(problem, ascent))
    search.raise_bound(bound.value)
    learn_option_bounds(search, bound.value + bound.reduced)
    search.note(prices=bound.prices)
    if bound.value > largest_objective(problem):
        search.close()
    return bound
