"""State budgets in a form that suits annealers: few levels, good prices, and penalties that match the prices.

A budget held by slack bits alone (`formulations.to_bqm` without prices) needs a penalty per squared unit of
its resource as large as the whole range of objectives. A byte is a small unit, so biases differ by factors of 10⁹ and
annealers freeze. Here a budget enters as in an augmented Lagrangian (Hestenes, doi:10.1007/BF00927673),

    price·(use + slack - budget) + overrun·(use + slack - budget)²

with uses counted from each group's smallest use, in a few levels (`formulations.forms.use_levels`). With the price
alone the minimum would be close to the best choice. ``overrun`` is `FIRMNESS` times the price divided by a typical step
between options, so that exceeding the budget by one step costs a few times its price. It is larger if a choice over the
budget would still be better than the best choice within it. Only choices that the search visited and their neighbours
are checked for this, and uses are rounded: the lowest energy may belong to a choice over the budget, so samples must be
evaluated.

Invariant: a choice means the same in both problems and has the same objective.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formulations.forms.couplings import Floats, Integers
from formulations.forms.descent import Descent
from formulations.forms.use_levels import in_levels, levels_for
from formulations.problem import Problem

FIRMNESS = 2.0
"""Penalty for exceeding a budget by one typical step, relative to the price of that step."""

MANY_GROUPS = 32
"""Number of groups from which an excess of less than a typical step is penalised like one of a whole step."""

ROUNDS = 40
"""Number of prices that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TightBudgets:
    """A problem in levels, with the prices and penalties that `formulations.to_bqm` needs for its budgets.

    Attributes:
        problem: the same choices at the same objectives; every use is a whole number of levels.
        prices: price of a level of each resource, in units of the objective.
        overrun: penalty for each squared level above a budget, in units of the objective.
    """

    problem: Problem
    prices: Mapping[str, float]
    overrun: Mapping[str, float]


def tight_budgets(problem: Problem, levels: int | None = None) -> TightBudgets:
    """Choose levels, prices and penalties for a problem's budgets; the number of levels may be given.

    Raises:
        EncodingError: a budget has pair terms.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [800, 400] * 2}, {"bytes": 1200})
    >>> tight = tight_budgets(problem)
    >>> tight.problem.resources["bytes"].tolist(), tight.problem.budgets["bytes"]
    ([1.0, 0.0, 1.0, 0.0], 1.0)
    """
    problem.require_linear_budgets("tight_budgets")
    coarse = in_levels(problem, levels_for(problem) if levels is None else levels)
    prices, overrun = _prices(coarse) if coarse.budgets else ({}, {})
    return TightBudgets(problem=coarse, prices=prices, overrun=overrun)


def _typical_step(problem: Problem, name: str) -> float:
    """Return the median distance of neighbouring uses within a group."""
    order = np.lexsort((problem.resources[name], problem.group_of))
    within = np.diff(problem.group_of[order]) == 0
    steps = np.diff(problem.resources[name][order])[within]
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0


def _prices(problem: Problem) -> tuple[dict[str, float], dict[str, float]]:
    """Return prices and overruns; the prices are those with the largest dual value of all that were tried.

    A price rises while its budget is exceeded and falls otherwise, by a factor that shrinks when the direction turns.
    """
    names = list(problem.budgets)
    use = np.stack([problem.resources[name] for name in names], axis=1)
    budget = np.array([problem.budgets[name] for name in names])
    search = Descent(problem)
    price = (float(np.ptp(problem.cost)) or 1.0) / np.maximum(use.max(axis=0), 1.0)
    chosen, factors, highest, best = search.cheapest(use @ price), np.full(len(names), 4.0), -np.inf, price
    before, visited = np.zeros(len(names), dtype=bool), []
    for _ in range(ROUNDS):
        chosen = search.descended(use @ price, chosen)
        visited.append(chosen.copy())
        excess = use[chosen].sum(axis=0) - budget
        dual = search.objective(chosen) + float(price @ excess)
        if dual > highest:
            highest, best = dual, price
        over = excess > 0
        factors = np.where(over == before, factors, np.sqrt(factors))
        price, before = np.where(over, price * factors, price / factors), over
    steps = np.array([_typical_step(problem, name) for name in names])
    overrun = FIRMNESS * best / steps
    overrun *= _raised(search, visited, use, budget, best, overrun, min(1.0, problem.num_groups / MANY_GROUPS) * steps)
    return dict(zip(names, best.tolist(), strict=True)), dict(zip(names, overrun.tolist(), strict=True))


def _raised(
    search: Descent,
    visited: list[Integers],
    use: Floats,
    budget: Floats,
    price: Floats,
    overrun: Floats,
    small: Floats,
) -> float:
    """Return the factor by which ``overrun`` must grow so that no choice over budget beats the best one within it.

    The factor covers the visited choices, their repaired versions, and all choices that differ from one of these in one
    group. An excess below ``small`` counts as ``small``: with many groups, many choices exceed a budget by little, and
    a factor that holds all of them would dominate the objective.
    """
    distinct = list(np.unique(np.stack(visited), axis=0))
    repaired = [search.repaired(chosen, use, budget) for chosen in distinct]
    around = [chosen for chosen in (*distinct, *repaired) if chosen is not None]
    objectives = np.concatenate([search.objective(chosen) + search.added(chosen) for chosen in around])
    group_of = search.problem.group_of
    uses = np.concatenate([use[chosen].sum(axis=0) + use - use[chosen][group_of] for chosen in around])
    excess = np.maximum(uses - budget, 0.0)
    over = excess.any(axis=1)
    if over.all() or not over.any():
        return 1.0
    squares = np.where(excess > 0, np.maximum(excess, small), 0.0)[over] ** 2 @ overrun
    needed = objectives[~over].min() - objectives[over] - excess[over] @ price
    return max(1.0, float((needed / squares).max()))
