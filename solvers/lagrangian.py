"""`lagrangian`: the dual's choice, repaired and improved, with the dual's bound and the budgets' prices.

Linear problems end with a proof: what bound and incumbent leave open is decided by Pareto lists (`solvers.pareto`).
With pair terms the dual's choice is annealed among the options that the bound leaves open; the gap says how far the
result can be from the optimum.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.presolve import Restriction, restrict
from solvers.anneal import Anneal
from solvers.base import Search, Solver
from solvers.bounds import DualBound, raise_dual_bound
from solvers.pareto import prove
from solvers.part import search_part
from solvers.repair import repair

MAX_STATES = 200_000
"""The longest Pareto list before the proof of a linear problem is given up (`dp` goes further)."""

ROUNDS = 4
"""How often the options that are left open are annealed at most."""

MOVES = 2_000_000
"""Moves for one of six choices in one round, within 200 and 2000 per group (some 0.1 s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian(Solver):
    """Lagrangian relaxation: bound, prices, a choice within the budgets; linear problems nearly always proven.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "lagrangian")
    >>> solution.objective, str(solution.status)
    (1.0, 'OPTIMAL')
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
            improve(problem, search, bound)


def begin(problem: Problem, search: Search) -> DualBound:
    """What exact solvers start from, too: the bound is raised, and a good choice offered where one is found."""
    bound = raise_dual_bound(problem, search, 0.4)
    if search.proven():
        return bound
    feasible = repair(problem, bound.choice)
    if feasible is not None:
        search.offer(feasible)
    if problem.pairs and not search.proven() and not search.expired():
        improve(problem, search, bound)
    return bound


def improve(problem: Problem, search: Search, bound: DualBound) -> None:
    """Anneal among the options that can still improve the incumbent, again and again while that helps.

    Each better incumbent leaves fewer of them: an option whose reduced cost reaches the gap is in no better choice.
    """
    with search.phase("anneal_s"):
        if search.choice is None:  # nothing is known that could leave options out
            search.initial = bound.choice
            Anneal(sweeps=500, population=4, generations=3).run(problem, search)
        for _ in range(ROUNDS):
            before = search.objective
            if before is None or search.proven() or search.expired():
                return
            part = open_part(problem, search, bound)
            sweeps = min(2000, max(200, MOVES // part.problem.num_groups))
            search_part(Anneal(sweeps=sweeps, population=6, generations=5), part, search)
            if search.objective == before:
                return


def open_part(problem: Problem, search: Search, bound: DualBound) -> Restriction:
    """The part of a problem that bound and incumbent leave open; all of it without an incumbent."""
    keep = np.ones(problem.num_options, dtype=bool)
    if search.objective is not None:
        keep = bound.reduced <= search.objective - bound.value
        keep[problem.group_offsets[:-1] + bound.choice] = True
    return restrict(problem, keep)
