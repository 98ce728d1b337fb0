"""`lagrangian`: the dual's choice, repaired and improved, with the dual's bound and the budgets' prices.

Linear problems end with a proof: what bound and incumbent leave open is decided by Pareto lists (`solvers.pareto`).
With pair terms the dual's choice is annealed from a low temperature; the bound stands, and the gap says how far the
choice can be from the optimum.
"""

from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.anneal import Anneal
from solvers.base import Search, Solver
from solvers.bounds import DualBound, dual_bound, largest_objective
from solvers.pareto import prove
from solvers.repair import repair

MAX_STATES = 200_000
"""The longest Pareto list before the proof of a linear problem is given up (`dp` goes further)."""

COLD_ANNEAL = Anneal(sweeps=400, population=4, generations=3)
"""A short one: it starts from the dual's choice, so it begins cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian(Solver):
    """Lagrangian relaxation: bound, prices, a choice within the budgets; linear problems nearly always proven.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "lagrangian")
    >>> solution.objective, solution.gap
    (1.0, 0.0)
    """

    name: ClassVar[str] = "lagrangian"
    summary: ClassVar[str] = "dual bound and budget prices, the dual's choice repaired and improved; any size"

    def run(self, problem: Problem, search: Search) -> None:
        """Bound, choice, and for linear problems the proof."""
        bound = begin(problem, search)
        if problem.pairs or search.proven():
            return
        with search.phase("proof_s"):
            prove(problem, search, bound, max_states=MAX_STATES)
        if not search.proven() and not search.expired():
            anneal_from(bound, problem, search)


def begin(problem: Problem, search: Search) -> DualBound:
    """What exact solvers start from, too: the bound is raised, and a good choice offered where one is found.

    A bound that no choice can meet closes the search: nothing is feasible.
    """
    with search.phase("bound_s"):
        bound = dual_bound(problem, time_limit=0.5 * search.remaining())
    search.raise_bound(bound.value)
    search.details["prices"] = bound.prices
    if bound.value > largest_objective(problem):
        search.close()
        return bound
    feasible = repair(problem, bound.choice)
    if feasible is not None:
        search.offer(feasible)
    if problem.pairs and not search.proven() and not search.expired():
        anneal_from(bound, problem, search)
    return bound


def anneal_from(bound: DualBound, problem: Problem, search: Search) -> None:
    """A short cold anneal from the incumbent, or from the dual's choice without one."""
    search.initial = search.choice if search.choice is not None else bound.choice
    with search.phase("anneal_s"):
        COLD_ANNEAL.run(problem, search)
