"""`auto`: picks solvers by the problem's structure and size, runs them one after the other, keeps the best of all.

Each one starts from the incumbent of those before it and all share one bound, so that what comes back is the best
choice with the best bound of everything that ran; the first proof ends it. What was picked, and why, is in
``details["plan"]``. A solver that needs the network is never picked.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import num_products
from solvers.base import Search, Solver
from solvers.bounds.warm import warm_bounds
from solvers.exact.brute_force import BruteForce, num_choices
from solvers.exact.dynamic_program import DynamicProgram
from solvers.exact.milp import Milp
from solvers.exact.miqp import Miqp
from solvers.heuristic.anneal import Anneal
from solvers.heuristic.lagrangian import Lagrangian

ENUMERABLE = 1e6
"""Up to so many choices all are looked at (some 20 ms)."""

LINEARISABLE = 50_000
"""Up to so many products of options the integer program has a chance to finish."""

FEW_OPTIONS = 5_000
"""Up to so many options the convex program of a factor is tried."""

EXACT_S = 60.0
"""How long an exact solver may take for a problem with pair terms when there is no time limit."""

Step = tuple[Solver, str, float]
"""A solver, why it is picked, and which share of the remaining time it may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto(Solver):
    """The best choice and the best bound of the solvers that suit the problem.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(100, rank=0), "auto")
    >>> str(solution.status), solution.details["plan"][0]
    ('OPTIMAL', 'lagrangian: no pair terms, so bound and incumbent leave little to decide')
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "picks by structure and size, returns the best choice and bound of all it ran"

    def prepare(self) -> None:
        """Compile the loops."""
        warm_bounds()

    def run(self, problem: Problem, search: Search) -> None:
        """Run the plan until something proves the answer or time is up."""
        search.details["plan"] = []
        for solver, why, share in plan(problem):
            if search.proven() or search.expired():
                return
            search.details["plan"].append(f"{solver.name}: {why}")
            if search.choice is not None:
                search.initial = search.choice
            seconds = share * search.remaining()
            if solver.exact and problem.pairs and np.isinf(seconds):
                seconds = EXACT_S
            with search.at_most(seconds):
                solver.run(problem, search)


def plan(problem: Problem) -> list[Step]:
    """The solvers that suit a problem, in the order they run."""
    if num_choices(problem) <= ENUMERABLE:
        return [(BruteForce(), "few enough choices to look at all", 1.0)]
    if not problem.pairs:
        return [
            (Lagrangian(), "no pair terms, so bound and incumbent leave little to decide", 0.5),
            (DynamicProgram(), "longer Pareto lists for what is still open", 0.5),
            (Milp(), "branch and bound for what is still open", 1.0),
        ]
    steps: list[Step] = [(Lagrangian(), "pair terms: a bound, budget prices and a good choice from the dual", 0.5)]
    products = num_products(problem)
    if problem.pairs.rank and problem.num_options <= FEW_OPTIONS and not Miqp.why_not():
        steps.append((Miqp(), "a factor and few enough options for the convex program to finish", 1.0))
    elif products <= LINEARISABLE:
        steps.append((Milp(), f"{products:,} products of options are few enough to linearise", 1.0))
    steps.append((Anneal(), "what time is left goes into a wider search", 1.0))
    return steps
