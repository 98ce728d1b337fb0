"""`auto`: picks solvers by the problem's structure and size and lets them take turns; keeps the best of all.

First a bound with a good choice from it. Then those that improve a choice take turns of a few hundredths of the time,
the next one being whose last turn gained most, and an exact solver has its turn as soon as few options are open, or
else when nobody improves the choice any more. Turns grow while nothing is found, and go on until the time is over or
the answer proven. All share incumbent, bound and what bounds have taught, so that each goes on where the others are.
What was picked, and why, is in ``details["plan"]``; who had which turn in ``details["turns"]``. A solver that needs
the network is never picked.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import num_products
from solvers.base import Search, Solver
from solvers.bounds.learned import learned
from solvers.bounds.warm import warm_bounds
from solvers.exact.brute_force import BruteForce, num_choices
from solvers.exact.dynamic_program import DynamicProgram
from solvers.exact.milp import Milp
from solvers.exact.miqp import Miqp
from solvers.heuristic.anneal import Anneal
from solvers.heuristic.genetic_algorithm import Genetic
from solvers.heuristic.greedy import Greedy
from solvers.heuristic.lagrangian import Lagrangian, open_part
from solvers.solution import relative_gap

ENUMERABLE = 1e6
"""Up to so many choices all are looked at (some 20 ms)."""

LINEARISABLE = 50_000
"""Up to so many products of options the integer program has a chance to finish."""

FEW_OPTIONS = 5_000
"""Up to so many options the convex program of a factor is tried."""

EXACT_S = 60.0
"""How long an exact solver may take for a problem with pair terms when there is no time limit."""

FEW_BUDGETS = 2
"""Up to so many budgets Pareto lists stay short enough for dynamic programming."""

FEW_OPEN, SMALL_GAP = 400, 0.05
"""Up to so many open options, at so small a relative gap, an exact solver's turn comes before the others'."""

GREEDY_SHARE, RELAX_SHARE, LONG_SHARE, PROOF_SHARE, TURN_SHARE = 0.1, 0.25, 0.5, 0.5, 0.1
"""Share of the time left for a first choice, the bound, the long turn that follows from it, an exact solver's turn, and
the first turns of all."""

WEAK_GAP = 0.1
"""Relative gap above which the long turn is the annealer's: the bound leads nowhere, though it had its time."""

ENTRY_S = 1e-6
"""Seconds a number of the problem that a turn takes at least: what a solver needs to begin is a part of it."""

Step = tuple[Solver, str]
"""A solver and why it is picked."""


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
    summary: ClassVar[str] = "solvers that suit structure and size take turns; the best choice and bound of all"

    def prepare(self) -> None:
        """Compile the loops."""
        warm_bounds()

    def run(self, problem: Problem, search: Search) -> None:
        """Let the plan's solvers take turns until something proves the answer or time is up."""
        turns = _Turns(problem, search)
        (first, why), *others = plan(problem)
        if problem.pairs and others:
            turns.take(Greedy(), "a choice to begin with", GREEDY_SHARE)
            turns.take(first, why, RELAX_SHARE)
            if np.isfinite(search.remaining()):  # else it had all the time it wanted, and the others will have
                weak = _gap(search) > WEAK_GAP and learned(search).ascent is None
                long = (Anneal(), "the bound says little, so a long search for good choices") if weak else (first, why)
                turns.take(*long, LONG_SHARE)
        else:
            turns.take(first, why, PROOF_SHARE if others else 1.0)
        exact = [step for step in others if step[0].exact]
        improving = [step for step in others if not step[0].exact]
        if problem.pairs:
            again = (first, "the bound goes on, with what the others found")
            improving.insert(0 if learned(search).ascent else len(improving), again)
        if not problem.pairs or _provable(problem, search):
            turns.prove(exact)
            exact = []
        turns.improve(improving, exact)


def _gap(search: Search) -> float:
    """The relative gap; infinite without a choice or a bound, 0 around zero."""
    if search.objective is None or search.bound is None:
        return float("inf")
    return relative_gap(search.objective, search.bound) or 0.0


def _provable(problem: Problem, search: Search) -> bool:
    """Whether a proof seems within reach."""
    return _gap(search) <= SMALL_GAP and open_part(problem, search).problem.num_options <= FEW_OPEN


class _Turns:
    """Gives solvers their turns and keeps the books."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search, self.count = problem, search, 0
        search.details["plan"], search.details["turns"] = [], []

    def over(self) -> bool:
        """Whether nothing is left to do, or no time."""
        return self.search.proven() or self.search.expired()

    def take(self, solver: Solver, why: str, share: float) -> None:
        """One turn of a share of the time left."""
        self._turn(solver, why, share * self.search.remaining())

    def prove(self, steps: list[Step]) -> None:
        """Each exact solver's turn."""
        for solver, why in steps:
            seconds = PROOF_SHARE * self.search.remaining()
            self._turn(solver, why, EXACT_S if self.problem.pairs and np.isinf(seconds) else seconds)

    def improve(self, steps: list[Step], exact: list[Step]) -> None:
        """Turns for those that improve choice or bound: the next one is whose last turn gained most a second.

        When nobody's gained anything the exact solvers have theirs, once, and the turns become twice as long. Where
        nothing limits the time each has one turn.
        """
        problem = self.problem
        entries = problem.num_options * (1 + problem.pairs.rank) + problem.pairs.num_sparse
        seconds = max(TURN_SHARE * self.search.remaining(), ENTRY_S * entries)
        while steps and not self.over():
            gains = [np.inf] * len(steps)
            while max(gains) > 0 and not self.over():
                following = int(np.argmax(gains))
                gain = self._turn(*steps[following], seconds)
                gains[following] = 0.0 if np.isinf(seconds) else gain
            self.prove(exact)
            if np.isinf(seconds):
                return
            exact, seconds = [], 2 * seconds

    def _turn(self, solver: Solver, why: str, seconds: float) -> float:
        """One turn; by how much a second choice and bound came nearer to each other (a first one: infinitely)."""
        search = self.search
        if self.over():
            return 0.0
        if (reason := f"{solver.name}: {why}") not in search.details["plan"]:
            search.details["plan"].append(reason)
        self.count += 1
        fresh = solver.name == "anneal" and self.count % 2  # every other time from random choices
        search.initial = None if fresh else search.choice
        before, bound, begun = search.objective, search.bound, search.elapsed()
        with search.at_most(seconds):
            solver.run(self.problem, search)
        took = search.elapsed() - begun
        better = _rise(search.objective, before)
        search.details["turns"].append({"solver": solver.name, "seconds": took, "better": better > 0})
        return (better + _rise(bound, search.bound)) / max(took, 1e-6)


def _rise(low: float | None, high: float | None) -> float:
    """How far a number rose (or, the other way round, fell); infinitely, where there was none before."""
    if low is None or high is None:
        return 0.0 if low is high else np.inf
    return high - low


def plan(problem: Problem) -> list[Step]:
    """The solvers that suit a problem: what bounds it, what improves a choice, what proves it."""
    if num_choices(problem) <= ENUMERABLE:
        return [(BruteForce(), "few enough choices to look at all")]
    improving: list[Step] = [(Anneal(), "what time is left goes into a wider search")]
    if not Genetic.why_not():
        improving.append((Genetic(), "recombines whole choices, where moves of one or two groups get stuck"))
    if not problem.pairs:
        steps: list[Step] = [(Lagrangian(), "no pair terms, so bound and incumbent leave little to decide")]
        if len(problem.budgets) <= FEW_BUDGETS:
            steps.append((DynamicProgram(), "longer Pareto lists for what is still open"))
        return [*steps, (Milp(), "branch and bound for what is still open"), *improving]
    steps = [(Lagrangian(), "pair terms: a bound, budget prices and a good choice from the dual"), *improving]
    products = num_products(problem)
    if problem.pairs.rank and problem.num_options <= FEW_OPTIONS and not Miqp.why_not():
        steps.append((Miqp(), "a factor and few enough options for the convex program to finish"))
    elif products <= LINEARISABLE:
        steps.append((Milp(), f"{products:,} products of options are few enough to linearise"))
    return steps
