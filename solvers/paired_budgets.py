"""Solve problems whose budgets have pair terms, by any solver at prices, followed by repair with the true uses.

Exact solvers get the linear statement of the budgets instead (`formulations.reductions.linearisation`), unless it is
too large, and thus prove what they find; `auto` gives it to `milp` after the prices. For the others, and for large
problems, prices are used:

A budget with pair terms is moved into the objective at a price (`formulations.reductions.pricing`), which leaves a
problem that every solver accepts. Prices are found by bisection with the Lagrangian dual, whose bounds hold for the
original problem. The solver then runs at the best prices and near them. The choices that it and the dual find are
repaired and improved with the true uses. `brute-force`, and `auto` on small problems, evaluate every choice directly.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.errors import EncodingError
from formulations.forms.integer_program import MAX_PRODUCTS, num_products
from formulations.reductions.linearisation import Linearisation, linearised
from formulations.reductions.pricing import priced
from solvers.bounds.dual import DualBound, largest_objective
from solvers.bounds.paired_dual import PairedDual
from solvers.exact.every_choice import offer_paired
from solvers.kernels.moves import Integers
from solvers.kernels.paired_uses import arrays_of, descend_paired, repair_paired
from solvers.paired_annealing import anneal_paired
from solvers.search import Search, cheapest, num_choices
from solvers.sub_search import SubSearch

DOUBLINGS, BISECTIONS = 40, 16
"""Maximum number of steps to find an upper limit for a price, and of bisection steps after that."""

PRECISION = 1e-3
"""Relative width of a price interval at which bisection stops."""

ROUNDS = 3
"""Number of rounds over the prices of several budgets."""

SPREAD = (1.0, 1.02, 0.98, 1.08)
"""Prices at which the solver runs, relative to the best ones; slightly too high ones lead to choices within budget."""

PRICE_SHARE, PRICE_S = 0.4, 60.0
"""Maximum fraction of the remaining time, and maximum time in seconds, for finding the prices."""

ANNEAL_SHARE = 0.5
"""Fraction of the solvers' time at prices that goes to annealing with the true uses instead."""

LINEAR_SHARE, LINEAR_S = 0.5, 60.0
"""Minimum fraction of the remaining time of a turn on the linear statement, and its time in seconds without a limit."""

FEW_CHOICES = 1e5
"""Maximum number of choices that are all tried, in a fraction of a second, if the prices lead to none within budget."""

PASSES = 20
"""Maximum number of passes of the descent."""

UNPROVEN = "the prices of budgets with pair terms are found, which leaves the answer unproven"
"""Why a run ends before the answer is proven, for ``details["stopped"]``."""

Attack = Callable[[Search], None]


def solve_paired(
    problem: Problem,
    search: Search,
    attack: Attack,
    *,
    exact: bool = False,
    anneal: bool = False,
    prove: Attack | None = None,
) -> None:
    """Search ``problem``, whose budgets have pair terms, by running ``attack`` on problems without such budgets.

    Args:
        problem: the problem.
        search: the search of the problem.
        attack: function that runs a solver on the problem of a search.
        exact: whether the solver proves optimality; it then gets the linear statement of the problem, if not too large.
        anneal: whether choices are annealed with the true uses after the prices.
        prove: function that runs another, exact solver on the linear statement after the prices.
    """
    within = Within(problem, search)
    with search.phase("price_s"):
        within.offer(cheapest(problem), paired=False)
        price_search = _Prices(problem, search)
        prices = price_search.best()
    search.note(prices=prices)
    if price_search.choice is not None:
        with search.phase("repair_s"):
            within.offer(price_search.choice)
    if search.choice is None and num_choices(problem) <= FEW_CHOICES:
        offer_paired(problem, search)
    if search.proven() or search.expired():
        return
    linear = _linear(problem, search) if exact or prove is not None else None
    if exact and linear is not None:
        _solve_linear(linear, search, attack)
        return
    if linear is not None and num_products(linear.problem) > MAX_PRODUCTS:
        linear = None  # more than the exact solver takes
    share = 1.0 if linear is None else 1.0 - LINEAR_SHARE
    _solve_at_prices(within, prices, attack, share * (1.0 - ANNEAL_SHARE) if anneal else share)
    if anneal and not (search.proven() or search.expired()):
        within.anneal(ANNEAL_SHARE * share / (1.0 - share * (1.0 - ANNEAL_SHARE)))
    if prove is not None and linear is not None and not (search.proven() or search.expired()):
        _solve_linear(linear, search, prove, LINEAR_S if np.isinf(search.remaining()) else None)
    if not (search.proven() or search.expired()):
        search.details.setdefault("stopped", UNPROVEN)


def _solve_at_prices(within: "Within", prices: Mapping[str, float], attack: Attack, share: float) -> None:
    """Run ``attack`` at the prices and near them, in a share of the remaining time."""
    search = within.search
    kept = 0.0 if np.isinf(search.remaining()) else (1.0 - share) * search.remaining()
    for number, factor in enumerate(SPREAD):
        left = search.remaining() - kept
        if search.proven() or search.expired() or left <= 0.0:
            return
        pricing = priced(within.problem, {name: factor * price for name, price in prices.items()})
        inner = SubSearch(pricing, search, seconds=left / (len(SPREAD) - number), initial=search.choice)
        attack(inner)
        if inner.choice is not None:
            with search.phase("repair_s"):
                within.offer(inner.choice)


def _linear(problem: Problem, search: Search) -> Linearisation | None:
    """State the budgets linearly; return None, and say so in the details, if that is too large."""
    try:
        with search.phase("build_s"):
            return linearised(problem)
    except EncodingError as error:
        search.details["stopped"] = f"{UNPROVEN}: {error}"
        return None


def _solve_linear(linear: Linearisation, search: Search, attack: Attack, seconds: float | None = None) -> None:
    """Run ``attack`` on the linear statement of the problem for ``seconds``, or for all of the remaining time."""
    inner = SubSearch(linear, search, seconds=seconds)
    if search.choice is not None:
        inner.begin_from(linear.lower(search.choice))
    attack(inner)
    if inner.cut:
        search.cut_short()


@cache
def prepare() -> None:
    """Compile the inner loops, or load them from disk, before the clock of a run starts."""
    terms = scipy.sparse.csr_array(([6.0], ([0], [2])), shape=(4, 4))
    tables = (["a", "b"], [["wide", "narrow"]] * 2, [0, 2, 0, 3], {"macs": [0] * 4}, {"macs": 5})
    for factor in (None, np.eye(4)):
        problem = Problem(*tables, PairTerms(factor=factor), 0.0, {}, {"macs": terms})
        solve_paired(problem, Search(problem, solver="warm"), lambda _: None, anneal=True)
        offer_paired(problem, Search(problem, solver="warm"))


class Within:
    """Repair choices to meet the true budgets, improve them, and report them to the search."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.arrays, self.uses = arrays_of(problem)

    def offer(self, choice: Integers, *, paired: bool = True) -> None:
        """Repair a choice, descend by single switches (with ``paired`` also by two at once), and report the results."""
        chosen = self.problem.flat(choice).copy()
        if not repair_paired(self.arrays, self.uses, chosen):
            return
        for number in range(PASSES):
            self.search.offer(chosen - self.problem.group_offsets[:-1])
            if self.search.expired():
                return
            if not descend_paired(self.arrays, self.uses, chosen, number, 1, paired):
                break
        self.search.offer(chosen - self.problem.group_offsets[:-1])

    def anneal(self, share: float) -> None:
        """Anneal with the true uses in a share of the remaining time, and improve the best choice."""
        with self.search.phase("anneal_s"), self.search.at_most(share * self.search.remaining()):
            anneal_paired(self.search, self.arrays, self.uses)
        if self.search.choice is not None:
            self.offer(self.search.choice)


class _Prices:
    """Search for the prices of budgets with pair terms, one budget after the other."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.names = problem.paired_budgets
        self.prices = dict.fromkeys(self.names, 0.0)
        self.choice: Integers | None = None  # the dual's last feasible choice, else its first choice
        self._dual = PairedDual(problem)
        self._most = largest_objective(problem.derived(budgets={}, resource_pairs={}))
        self._deadline = time.perf_counter() + min(PRICE_S, PRICE_SHARE * search.remaining())

    def best(self) -> Mapping[str, float]:
        """Find the smallest prices at which the dual's choice meets the budgets, and report every bound on the way."""
        if self._over(self.prices):
            for _ in range(ROUNDS if len(self.names) > 1 else 1):
                for name in self.names:
                    self._bisect(name)
        return self.prices

    def _bisect(self, name: str) -> None:
        low, high = 0.0, self.prices[name] or self._scale(name)
        for _ in range(DOUBLINGS):
            if self._ends() or not self._over({**self.prices, name: high}, name):
                break
            low, high = high, 4.0 * high
        for _ in range(BISECTIONS):
            if self._ends() or high - low < PRECISION * high:
                break
            middle = (low * high) ** 0.5 if low else 0.25 * high
            if self._over({**self.prices, name: middle}, name):
                low = middle
            else:
                high = middle
        self.prices[name] = high

    def _ends(self) -> bool:
        return self.search.proven() or self.search.expired() or time.perf_counter() > self._deadline

    def _over(self, prices: Mapping[str, float], name: str | None = None) -> bool:
        """Whether the dual's choice at these prices exceeds a budget (only that of ``name`` if given)."""
        bound = self.dual(prices)
        broken = set(self.problem.evaluate(bound.choice).violations)
        if not broken or self.choice is None:
            self.choice = bound.choice
        if not broken:
            self.search.offer(bound.choice)
        return bool(broken & set(self.names)) if name is None else name in broken

    def dual(self, prices: Mapping[str, float]) -> DualBound:
        """Compute the dual at these prices, and report its bound."""
        bound: DualBound = self._dual.bound(prices, self._deadline)
        self.search.raise_bound(min(bound.value, self._most))
        return bound

    def _scale(self, name: str) -> float:
        """Return a price at which the resource contributes about a hundredth of the objective."""
        starts, use = self.problem.group_offsets[:-1], self.problem.resources[name]
        terms = self.problem.resource_pairs[name]
        most = float(np.maximum.reduceat(use, starts).sum()) + float(terms.sum()) / max(1.0, self.problem.num_options)
        cost = np.maximum.reduceat(self.problem.cost, starts) - np.minimum.reduceat(self.problem.cost, starts)
        return 1e-2 * max(float(cost.sum()), 1e-9) / max(most, 1e-9)


def priced_bound(problem: Problem, seconds: float = float("inf")) -> tuple[float, dict[str, float]]:
    """Return a lower bound for a problem whose budgets have pair terms, and the prices of all of its budgets.

    Args:
        problem: the problem.
        seconds: maximum time; the prices are then those found so far.
    """
    search = Search(problem, solver="prices", time_limit=None if np.isinf(seconds) else max(seconds, 1e-9))
    price_search = _Prices(problem, search)
    prices = price_search.best()
    others = price_search.dual(prices).prices
    return -np.inf if search.bound is None else search.bound, {**others, **prices}
