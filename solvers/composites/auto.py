"""`auto`: select solvers by the problem's structure and size, run them in turns, and keep the best result of all.

The first solver computes a bound and a good choice from it. Then solvers that improve a choice take turns of a small
fraction of the time; the next turn goes to the solver whose last turn gained most per second. An exact solver gets its
turn as soon as few options are open, or the dual bound is tight and there is no factor, or when no solver improves the
choice any more. Turns grow while nothing is found, and continue until the time is over or the answer is proven. All
solvers share the incumbent, the bound and the stored results of bounds, so each one builds on the others.
``details["plan"]`` lists the selected solvers with the reasons, ``details["turns"]`` lists all turns. Solvers that need
the network are never selected.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import MAX_PRODUCTS, num_products
from solvers.base import Search, Solver
from solvers.bounds.learned import learned
from solvers.bounds.warm import warm_bounds
from solvers.exact.base import TIGHT
from solvers.exact.brute_force import BruteForce, warm_enumeration
from solvers.exact.dynamic_program import DynamicProgram
from solvers.exact.milp import Milp
from solvers.exact.miqp import Miqp
from solvers.exact.semidefinite import Semidefinite
from solvers.heuristic.anneal import Anneal
from solvers.heuristic.genetic_algorithm import Genetic
from solvers.heuristic.greedy import Greedy
from solvers.heuristic.lagrangian import Lagrangian, begin, open_part, tighten
from solvers.search import num_choices
from solvers.uneven import uneven

ENUMERABLE = 1e6
"""Maximum number of choices to enumerate (about 20 ms; 3 s if budgets have pair terms)."""

LINEARISABLE = 50_000
"""Maximum number of products of options for which the integer program is tried."""

FEW_OPTIONS = 5_000
"""Maximum number of options for which the convex program of a factor is tried."""

EXACT_S = 60.0
"""Maximum time in seconds of an exact solver for a problem with pair terms, if there is no time limit."""

FEW_BUDGETS = 2
"""Maximum number of budgets for which dynamic programming is tried, since Pareto lists then stay short."""

FEW_OPEN, SMALL_GAP = 400, 0.05
"""Maximum number of open options, and maximum relative gap, at which exact solvers get their turns before others."""

GREEDY_SHARE, RELAX_SHARE, LONG_SHARE, PROOF_SHARE, TURN_SHARE = 0.1, 0.25, 0.5, 0.5, 0.1
"""Fractions of the remaining time for a first choice, the bound, the long turn after it, an exact solver's turn, and
the first turns of the others."""

TIGHT_SHARE = 0.8
"""Fraction for branch and bound where the others find little: without pair terms, or with a bound that is `TIGHT`."""

WEAK_GAP = 0.1
"""Relative gap above which the long turn is given to annealing, because the bound is weak after its full time."""

SEMIDEFINITE_OPTIONS, MANY_TERMS = 800, 4
"""Maximum number of options, and minimum number of pair terms per group, for branch and bound with semidefinite
bounds."""

FEW_PRODUCTS = 2_000
"""Number of products of open options up to which the integer program of a dense problem is tried before branch and
bound with semidefinite bounds."""

BUILD_SHARE = 0.7
"""Maximum fraction of its turn that it may take to build the integer program, if the dual bound is `TIGHT`."""

DENSE_SHARE = 0.4
"""Fraction of the remaining time for its first turn."""

FORBIDDING_SHARE, FORBIDDING_S = 0.5, 0.3
"""Maximum fraction of the remaining time, and maximum time in seconds, for annealing if a choice without forbidding
costs must be found first."""

FORBIDDING = "costs that forbid options are in the best known choice, and bounds are weak compared to them"

FIRST = "branch and bound, as few products are open or the dual bound is tight"

DENSE = "two options a group and dense pair terms: semidefinite bounds, then branch and bound"

ENTRY_S = 1e-6
"""Minimum time of a turn in seconds, per number in the problem, since every solver needs time to start."""

Step = tuple[Solver, str]
"""A solver, and why it is selected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto(Solver):
    """Run the solvers that suit the problem in turns, and keep the best choice and the best bound.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(100, rank=0), "auto")
    >>> str(solution.status), solution.details["plan"][0]
    ('OPTIMAL', 'lagrangian: no pair terms, so bound and incumbent leave little to decide')
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "runs the solvers that suit the problem, one after another; best choice and bound of all"
    anneals_use_pairs: ClassVar[bool] = True

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_bounds()
        warm_enumeration()

    def takes_use_pairs(self, problem: Problem) -> bool:
        """Whether there are few enough choices for `brute-force`, which takes the pair terms in budgets directly."""
        return num_choices(problem) <= ENUMERABLE

    def at_prices(self) -> Solver:
        """Return `lagrangian`, since the time at each price is too short for turns of several solvers."""
        return Lagrangian()

    def prover(self) -> Solver | None:
        """Return `milp`, for the linear statement of budgets with pair terms."""
        return None if Milp.why_not() else Milp()

    def run(self, problem: Problem, search: Search) -> None:
        """Run the plan's solvers in turns until the answer is proven or the time is over."""
        turns = _Turns(problem, search)
        (first, why), *others = plan(problem)
        exact = [step for step in others if step[0].exact]
        improving = [step for step in others if not step[0].exact]
        if problem.pairs and others:
            turns.take(Greedy(), "a first choice", GREEDY_SHARE)
            if uneven(problem) and np.isfinite(search.remaining()):
                turns.take(Anneal(), FORBIDDING, min(FORBIDDING_SHARE, FORBIDDING_S / max(search.remaining(), 1e-9)))
            turns.take(_FirstBound(), why, RELAX_SHARE)
            if not turns.over() and _linearisable(problem, search):
                turns.prove([(Milp(), FIRST)], PROOF_SHARE if dense(problem) else TIGHT_SHARE)
                exact = [step for step in exact if not isinstance(step[0], Milp)]
            if dense(problem):
                turns.take(Semidefinite(), DENSE, DENSE_SHARE)
            elif np.isfinite(search.remaining()):  # without a time limit, all solvers run to their end
                weak = search.gap > WEAK_GAP and learned(search).ascent is None
                long = (Anneal(), "the bound is weak, so a long search for good choices") if weak else (first, why)
                turns.take(*long, LONG_SHARE)
        else:
            turns.take(first, why, PROOF_SHARE if others else 1.0)
        if problem.pairs:
            again = (first, "the bound continues, with the others' results")
            improving.insert(0 if learned(search).ascent else len(improving), again)
            if np.isfinite(search.remaining()):  # it resumes its tree
                improving += [step for step in exact if isinstance(step[0], Semidefinite)]
        if not problem.pairs:
            turns.prove(exact[:-1])
            turns.prove(exact[-1:], TIGHT_SHARE)
            exact = []
        elif _provable(problem, search):
            turns.prove(exact)
            exact = []
        turns.improve(improving, exact)


def dense(problem: Problem) -> bool:
    """Whether the semidefinite bound suits: two options a group, not too many, and many pair terms of each."""
    two = bool((np.diff(problem.group_offsets) == 2).all())
    few = problem.num_options <= SEMIDEFINITE_OPTIONS and len(problem.budgets) <= FEW_BUDGETS
    return two and few and problem.pairs.num_sparse >= MANY_TERMS * problem.num_groups


def _linearisable(problem: Problem, search: Search) -> bool:
    """Whether the integer program of the open part is worth a turn before a semidefinite bound."""
    if dense(problem):
        return bool(problem.budgets) and num_products(open_part(problem, search).problem) <= FEW_PRODUCTS
    if search.gap > TIGHT or problem.pairs.rank:
        return False
    part = open_part(problem, search).problem
    turn = min(TIGHT_SHARE * search.remaining(), EXACT_S)
    return num_products(part) <= MAX_PRODUCTS and Milp.build_s(part) <= BUILD_SHARE * turn


def _provable(problem: Problem, search: Search) -> bool:
    """Whether a proof seems possible."""
    return search.gap <= SMALL_GAP and open_part(problem, search).problem.num_options <= FEW_OPEN


class _FirstBound(Lagrangian):
    """`lagrangian`, without a semidefinite bound where the dual bound is tight."""

    def run(self, problem: Problem, search: Search) -> None:
        bound = begin(problem, search)
        if search.gap > TIGHT:
            tighten(problem, search, bound)


class _Turns:
    """Run solvers in turns and record the turns."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search, self.count = problem, search, 0
        search.details["plan"], search.details["turns"] = [], []

    def over(self) -> bool:
        """Whether the answer is proven or the time is over."""
        return self.search.proven() or self.search.expired()

    def take(self, solver: Solver, why: str, share: float) -> None:
        """Run one turn with a fraction of the remaining time."""
        seconds = share * self.search.remaining()
        self._turn(solver, why, EXACT_S if isinstance(solver, Semidefinite) and np.isinf(seconds) else seconds)

    def prove(self, steps: list[Step], share: float = PROOF_SHARE) -> None:
        """Run one turn of each exact solver."""
        for solver, why in steps:
            seconds = share * self.search.remaining()
            self._turn(solver, why, EXACT_S if self.problem.pairs and np.isinf(seconds) else seconds)

    def improve(self, steps: list[Step], exact: list[Step]) -> None:
        """Run turns of solvers that improve choice or bound, next the one whose last turn gained most per second.

        When all last turns gained nothing, the exact solvers get one turn each (only once), and turns become twice as
        long. Without a time limit each solver gets one turn.
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
        """Run one turn; return how fast it closed the gap, per second (infinite for a first choice or bound)."""
        search = self.search
        if self.over():
            return 0.0
        if (reason := f"{solver.name}: {why}") not in search.details["plan"]:
            search.details["plan"].append(reason)
        self.count += 1
        search.details.pop("stopped", None)  # the run goes on
        fresh = solver.name == "anneal" and self.count % 2  # every other turn starts from random choices
        search.initial = None if fresh else search.choice
        before, bound, begun = search.objective, search.bound, search.elapsed()
        with search.at_most(seconds):
            solver.run(self.problem, search)
        took = search.elapsed() - begun
        better = _rise(search.objective, before)
        turn = {"solver": solver.name, "seconds": took, "better": better > 0}
        if "stopped" in search.details:
            turn["stopped"] = search.details["stopped"]
        search.details["turns"].append(turn)
        return (better + _rise(bound, search.bound)) / max(took, 1e-6)


def _rise(low: float | None, high: float | None) -> float:
    """Return how far a number rose (or fell, with swapped arguments); infinite if there was none before."""
    if low is None or high is None:
        return 0.0 if low is high else np.inf
    return high - low


def plan(problem: Problem) -> list[Step]:
    """Select the solvers that suit a problem: for its bound, for improving a choice, and for a proof."""
    if num_choices(problem) <= ENUMERABLE:
        return [(BruteForce(), "few enough choices to evaluate all")]
    improving: list[Step] = [(Anneal(), "a wider search in the remaining time")]
    if not Genetic.why_not():
        improving.append((Genetic(), "recombines whole choices when moves of one or two groups get stuck"))
    if not problem.pairs:
        steps: list[Step] = [(Lagrangian(), "no pair terms, so bound and incumbent leave little to decide")]
        if len(problem.budgets) <= FEW_BUDGETS:
            steps.append((DynamicProgram(), "longer Pareto lists for what is still open"))
        return [*steps, (Milp(), "branch and bound for what is still open"), *improving]
    steps = [(Lagrangian(), "pair terms: a bound, budget prices and a good choice from the dual"), *improving]
    products = num_products(problem)
    if dense(problem):
        if problem.budgets and products <= LINEARISABLE:
            steps.append((Milp(), "branch and bound for what the semidefinite bound leaves open"))
        steps.append((Semidefinite(), DENSE))
    elif problem.pairs.rank and problem.num_options <= FEW_OPTIONS and not Miqp.why_not():
        steps.append((Miqp(), "a factor and few enough options for the convex program to finish"))
    elif products <= LINEARISABLE:
        steps.append((Milp(), f"{products:,} products of options are few enough to linearise"))
    return steps
