"""Solving problems whose budgets have pair terms: at prices, by any solver, with true uses at the end.

A budget with pair terms is taken into the objective at a price (`formulations.reductions.pricing`); what is left is a
problem that every solver takes. Prices are bisected by the Lagrangian dual, whose bounds hold for the stated problem;
the solver then works at the best prices, and around them. What it and the dual find is repaired and improved within
the true uses. `brute-force` looks at every choice as it is, and so proves.
"""

from collections.abc import Callable, Mapping

import numpy as np

from formulations import Problem
from formulations.reductions.pricing import priced
from solvers.bounds.dual import DualBound
from solvers.bounds.duality import dual_bound, largest_objective
from solvers.kernels.moves import Integers
from solvers.kernels.paired_uses import arrays_of, descend_paired, repair_paired
from solvers.search import Search
from solvers.sub_search import SubSearch

DOUBLINGS, BISECTIONS = 60, 24
"""Steps in which a price is first found too high, then narrowed."""

ROUNDS = 3
"""Rounds over the prices of several budgets."""

SPREAD = (1.0, 1.03, 0.97, 1.1)
"""Prices that the solver works at, relative to the best one: just too high, to end within the budget."""

BOUND_SHARE = 0.4
"""Share of the time that the prices take."""

DUALS = 30
"""One dual takes this part of that share at most."""

PASSES = 12

Attack = Callable[[Search], None]


def solve_paired(problem: Problem, search: Search, attack: Attack) -> None:
    """Search ``problem``, whose budgets have pair terms, with what ``attack`` does to a priced problem."""
    within = Within(problem, search)
    with search.phase("price_s"):
        within.offer(_cheapest(problem))
        prices = _Prices(problem, search, within).best()
    search.note(prices=prices)
    for number, factor in enumerate(SPREAD):
        if search.proven() or search.expired():
            return
        at = priced(problem, {name: factor * price for name, price in prices.items()})
        inner = SubSearch(at, search, seconds=search.remaining() / (len(SPREAD) - number), initial=search.choice)
        attack(inner)
        if inner.choice is not None:
            with search.phase("repair_s"):
                within.offer(inner.choice)


class Within:
    """Makes choices fit the true budgets, better, and offers them."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search = problem, search
        self.arrays, self.uses = arrays_of(problem)
        self._seen: set[bytes] = set()

    def offer(self, choice: Integers) -> None:
        """Repair, descend, offer."""
        chosen = self.problem.flat(choice).copy()
        if chosen.tobytes() in self._seen:
            return
        self._seen.add(chosen.tobytes())
        if repair_paired(self.arrays, self.uses, chosen):
            self.search.offer(chosen - self.problem.group_offsets[:-1])
            descend_paired(self.arrays, self.uses, chosen, PASSES)
            self.search.offer(chosen - self.problem.group_offsets[:-1])


class _Prices:
    """The prices of budgets with pair terms, one after the other."""

    def __init__(self, problem: Problem, search: Search, within: Within) -> None:
        self.problem, self.search, self.within = problem, search, within
        self.names = problem.paired_budgets
        self.prices = dict.fromkeys(self.names, 0.0)
        self.value = -np.inf

    def best(self) -> Mapping[str, float]:
        """The prices of the highest bound that is met; every bound is handed in."""
        kept = dict(self.prices)
        if self._over(self._at(self.prices)):
            for _ in range(ROUNDS if len(self.names) > 1 else 1):
                for name in self.names:
                    self._bisect(name)
            kept = self.prices
        return kept

    def _bisect(self, name: str) -> None:
        low, high = 0.0, self.prices[name] or self._scale(name)
        for _ in range(DOUBLINGS):
            if self._ends() or not self._over(self._at({**self.prices, name: high}), name):
                break
            low, high = high, 4.0 * high
        for _ in range(BISECTIONS):
            if self._ends() or high - low < 1e-4 * high:
                break
            middle = 0.5 * (low + high) if low else 0.25 * high
            if self._over(self._at({**self.prices, name: middle}), name):
                low = middle
            else:
                high = middle
        self.prices[name] = high

    def _ends(self) -> bool:
        return self.search.proven() or self.search.expired()

    def _at(self, prices: Mapping[str, float]) -> DualBound:
        problem = priced(self.problem, prices).problem
        bound = dual_bound(problem, time_limit=BOUND_SHARE * self.search.remaining() / DUALS)
        self.search.raise_bound(min(bound.value, largest_objective(self.problem.derived(budgets={}))))
        self.within.offer(bound.choice)
        return bound

    def _over(self, bound: DualBound, name: str | None = None) -> bool:
        """Whether the dual's choice uses more than the budget."""
        broken = self.problem.evaluate(bound.choice).violations
        return bool(set(broken) & set(self.names)) if name is None else name in broken

    def _scale(self, name: str) -> float:
        """A price at which the resource weighs about a hundredth of the objective."""
        starts, use = self.problem.group_offsets[:-1], self.problem.resources[name]
        terms = self.problem.resource_pairs[name]
        most = float(np.maximum.reduceat(use, starts).sum()) + float(terms.sum()) / max(1.0, self.problem.num_options)
        cost = np.maximum.reduceat(self.problem.cost, starts) - np.minimum.reduceat(self.problem.cost, starts)
        return 1e-2 * max(float(cost.sum()), 1e-9) / max(most, 1e-9)


def _cheapest(problem: Problem) -> Integers:
    starts = problem.group_offsets[:-1]
    order = np.lexsort((problem.cost, problem.group_of))
    return np.asarray(order[starts] - starts)
