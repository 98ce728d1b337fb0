"""Move budgets into the objective at a price: the Lagrangian relaxation.

With prices λ ≥ 0 for some budgets the problem becomes

    minimise  objective + Σ_k λ_k·(usage_k - budget_k)

without those budgets. Pair terms of a resource become pair terms of the objective, which every solver accepts. A lower
bound on the priced problem is a lower bound on the original, because nothing positive is added to the objective of a
feasible choice. Unlike other reductions this one maps only bounds: a choice may exceed the priced budgets, and its
objective differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem, limit_of
from formulations.reductions.base import Choice, Reduction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pricing(Reduction):
    """A problem with some of its budgets priced; see the module's docstring.

    Attributes:
        original: the problem with its budgets.
        problem: the problem with the priced objective and without the priced budgets.
        prices: name of a budget → price per unit of its resource.
    """

    same_choices: ClassVar[bool] = True
    original: Problem
    problem: Problem
    prices: Mapping[str, float]

    @property
    def complete(self) -> bool:
        """False, because the best priced choice may exceed a budget or leave part of it unused."""
        return False

    def lift(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lower(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lift_bound(self, bound: float) -> float:
        """Return the same bound."""
        return bound


def priced(problem: Problem, prices: Mapping[str, float]) -> Pricing:
    """Move budgets into the objective at the given prices.

    Args:
        problem: any problem.
        prices: name of a budget → price per unit of its resource, in units of the objective, not negative.

    Raises:
        InvalidProblemError: a budget is unknown, or a price is negative or not finite.

    >>> terms = scipy.sparse.csr_array(([6.0], ([0], [2])), shape=(4, 4))
    >>> problem = Problem(
    ...     ["a", "b"], [["wide", "narrow"]] * 2, [0, 2, 0, 3], {"macs": [0] * 4}, {"macs": 5}, None, 0.0, {},
    ...     {"macs": terms},
    ... )
    >>> relaxed = priced(problem, {"macs": 0.5}).problem
    >>> dict(relaxed.budgets), [round(relaxed.evaluate(choice).objective, 9) for choice in ([0, 0], [1, 0])]
    ({}, [0.5, -0.5])
    """
    cost, offset, sparse = problem.cost.copy(), problem.offset, problem.pairs.sparse
    for name, price in prices.items():
        if name not in problem.budgets:
            raise InvalidProblemError(f"no budget is called {name!r}; there are: {', '.join(problem.budgets)}")
        if not (np.isfinite(price) and price >= 0):
            raise InvalidProblemError(f"the price of {name!r} must be a finite number, not negative, found {price!r}")
        budget = problem.budgets[name]
        cost += price * problem.resources[name]
        offset += price * (problem.fixed.get(name, 0.0) - limit_of(budget))
        terms = problem.resource_pairs.get(name)
        if terms is not None and price:
            sparse = price * terms if sparse is None else scipy.sparse.csr_array(sparse + price * terms)
    cost.flags.writeable = False
    unpriced = {name: budget for name, budget in problem.budgets.items() if name not in prices}
    relaxed = problem.derived(
        cost=cost,
        offset=float(offset),
        pairs=PairTerms.trusted(sparse=sparse, factor=problem.pairs.factor),
        budgets=MappingProxyType(unpriced),
        resources=MappingProxyType({name: problem.resources[name] for name in unpriced}),
        fixed=MappingProxyType({name: use for name, use in problem.fixed.items() if name in unpriced}),
        resource_pairs=MappingProxyType({}),
    )
    return Pricing(original=problem, problem=relaxed, prices=MappingProxyType(dict(prices)))
