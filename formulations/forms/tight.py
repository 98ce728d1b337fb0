"""A problem's budgets in the form that annealers cope with: few levels, good prices, and penalties that match them.

A budget held by slack bits alone (`formulations.to_bqm` without prices) needs, for every squared unit of its resource,
all that objectives can differ by. Bytes are small units: biases differ by factors of 10⁹, and annealers freeze. Here a
budget enters as in an augmented Lagrangian (Hestenes, doi:10.1007/BF00927673),

    price·(use + slack - budget) + overrun·(use + slack - budget)²

with uses counted from each group's least one, in a few levels (`formulations.forms.levels`). The price alone
would have about the best choice as its minimum; ``overrun`` is `FIRMNESS` times the price over a typical step between
options, so that a miss by one step costs a few times its price; or more where a choice over the budget would still be
better than the best one within it. Only choices that were met and their neighbours are known to be held so, and uses
are rounded: the least energy may belong to a choice over the budget, and samples have to be judged.

What always holds: a choice means the same in both problems and has the same objective.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from formulations.forms.couplings import Floats, Integers
from formulations.forms.descent import Descent
from formulations.forms.levels import in_levels, levels_for
from formulations.problem import Problem

FIRMNESS = 2.0
"""What a miss by one typical step costs beside its price, in that price."""

MANY_GROUPS = 32
"""Groups from which on a miss of less than a typical step is not held more strongly than one of a step."""

ROUNDS = 40
"""Prices that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TightBudgets:
    """A problem in levels, and what `formulations.to_bqm` is to hold its budgets with.

    Attributes:
        problem: the same choices at the same objectives; every use is a whole number of levels.
        prices: objective for each level of a resource.
        overrun: objective for each squared level by which a budget is missed.
    """

    problem: Problem
    prices: Mapping[str, float]
    overrun: Mapping[str, float]


def tight_budgets(problem: Problem, levels: int | None = None) -> TightBudgets:
    """Levels, prices and penalties for a problem's budgets; as many levels as suit it unless they are given.

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
    """The median distance of neighbouring uses within a group."""
    order = np.lexsort((problem.resources[name], problem.group_of))
    within = np.diff(problem.group_of[order]) == 0
    steps = np.diff(problem.resources[name][order])[within]
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0


def _prices(problem: Problem) -> tuple[dict[str, float], dict[str, float]]:
    """Prices and overruns: the prices are those of the largest dual value that was found.

    Each is moved up where its budget is missed and down else, by factors that shrink whenever the direction turns.
    """
    names = list(problem.budgets)
    use = np.stack([problem.resources[name] for name in names], axis=1)
    budget = np.array([problem.budgets[name] for name in names])
    search = Descent(problem)
    price = (float(np.ptp(problem.cost)) or 1.0) / np.maximum(use.max(axis=0), 1.0)
    chosen, factors, highest, best = search.cheapest(use @ price), np.full(len(names), 4.0), -np.inf, price
    before, met = np.zeros(len(names), dtype=bool), []
    for _ in range(ROUNDS):
        chosen = search.at(use @ price, chosen)
        met.append(chosen.copy())
        missed = use[chosen].sum(axis=0) - budget
        dual = search.objective(chosen) + float(price @ missed)
        if dual > highest:
            highest, best = dual, price
        over = missed > 0
        factors = np.where(over == before, factors, np.sqrt(factors))
        price, before = np.where(over, price * factors, price / factors), over
    steps = np.array([_typical_step(problem, name) for name in names])
    overrun = FIRMNESS * best / steps
    overrun *= _raised(search, met, use, budget, best, overrun, min(1.0, problem.num_groups / MANY_GROUPS) * steps)
    return dict(zip(names, best.tolist(), strict=True)), dict(zip(names, overrun.tolist(), strict=True))


def _raised(
    search: Descent,
    met: list[Integers],
    use: Floats,
    budget: Floats,
    price: Floats,
    overrun: Floats,
    small: Floats,
) -> float:
    """By what factor ``overrun`` must grow for no choice over budget to be better than the best within the budgets.

    Looked at are the choices that were met, those repaired, and all that differ from one of them in one group. A miss
    below ``small`` counts as one of that size: where there are many groups, many choices miss by little, and what would
    hold all of them would hold everything.
    """
    distinct = list(np.unique(np.stack(met), axis=0))
    repaired = [search.repaired(chosen, use, budget) for chosen in distinct]
    around = [chosen for chosen in (*distinct, *repaired) if chosen is not None]
    objectives = np.concatenate([search.objective(chosen) + search.added(chosen) for chosen in around])
    group_of = search.problem.group_of
    uses = np.concatenate([use[chosen].sum(axis=0) + use - use[chosen][group_of] for chosen in around])
    missed = np.maximum(uses - budget, 0.0)
    over = missed.any(axis=1)
    if over.all() or not over.any():
        return 1.0
    squares = np.where(missed > 0, np.maximum(missed, small), 0.0)[over] ** 2 @ overrun
    needed = objectives[~over].min() - objectives[over] - missed[over] @ price
    return max(1.0, float((needed / squares).max()))
