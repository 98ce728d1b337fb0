"""`lagrangian`: the dual's choice, repaired and improved, with the dual's bound and the budgets' prices.

Linear problems end with a proof: what bound and incumbent leave open is decided by Pareto lists
(`solvers.bounds.pareto_lists`). With pair terms the dual's choice is annealed among the options that the bound leaves
open; the gap says how far the result can be from the optimum.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.reductions.restriction import Restriction, restrict
from solvers.base import Search, Solver, SubSearch
from solvers.bounds.duality import DualBound, raise_dual_bound
from solvers.bounds.learned import learn_certified, learn_option_bounds, learn_searched, learned
from solvers.bounds.pareto_lists import prove
from solvers.bounds.semidefinite import least_seconds, semidefinite_bound
from solvers.bounds.warm import warm_bounds
from solvers.heuristic.anneal import Anneal
from solvers.kernels.local_search import polish
from solvers.kernels.repair import repair

MAX_STATES = 200_000
"""The longest Pareto list before the proof of a linear problem is given up (`dp` goes further)."""

CORES = (250, 1000, 4000, 16_000)
"""Maximum number of open options that are annealed in one round."""

MOVES = 2_000_000
"""Moves for one of six choices in one round, within 200 and 2000 per group (some 0.1 s)."""

MAX_OPTIONS = 1000
"""Open options up to which the semidefinite bound is tried (half a second an iteration)."""

CERTIFY_SHARE, CERTIFY_S = 0.3, 20.0
"""Share of the time left that it may take, and how long without a time limit."""

SHRUNK = 0.9
"""It is tried again when no more than this share of the options is still open."""


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

    def prepare(self) -> None:
        """Compile the loops."""
        warm_bounds()

    def run(self, problem: Problem, search: Search) -> None:
        """Bound, choice, and for linear problems the proof."""
        bound = begin(problem, search)
        if search.proven():
            return
        if problem.pairs:
            before = search.objective
            certify(problem, search)
            if search.objective is not None and search.objective != before:
                improve(problem, search, bound)
            return
        with search.phase("proof_s"):
            prove(problem, search, bound, max_states=MAX_STATES)
        if not search.proven() and not search.expired():
            improve(problem, search, bound)


def begin(problem: Problem, search: Search) -> DualBound:
    """Raise the bound and offer a good choice where one is found: the start of all other work."""
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
    """Anneal among the options that can still improve the incumbent, those with the lowest bounds first.

    The dual's choice is off by the few groups that it leaves near a tie, and what is best for them is soon found. Each
    better incumbent leaves fewer options: one whose reduced cost reaches the gap is in no better choice. What time cut
    goes on from there when it is called again.
    """
    with search.phase("anneal_s"):
        if search.choice is None:  # nothing is known that could leave options out
            search.initial = bound.choice
            Anneal(sweeps=500, population=4, generations=3).run(problem, search)
        for most in CORES:
            before = search.objective
            if before is None or search.proven() or search.expired():
                return
            objective, searched = learned(search).searched
            if objective == before and most <= searched < CORES[-1]:
                continue
            part = open_part(problem, search, most)
            sweeps = min(2000, max(200, MOVES // part.problem.num_groups))
            start = None if search.choice is None else part.lower(search.choice)
            anneal = Anneal(sweeps=sweeps, population=6, generations=5)
            anneal.run(part.problem, SubSearch(part, search, initial=start))
            if search.objective == before and not search.expired():
                whole = part.problem.num_options < most
                learn_searched(search, before, CORES[-1] if whole else most)
                if whole:
                    return


def open_part(problem: Problem, search: Search, most: int | None = None) -> Restriction:
    """The part of a problem that bounds and incumbent leave open; all of it without an incumbent.

    No choice outside of it is better than the incumbent. Every group keeps at least the option whose bound is lowest,
    and beyond those and the incumbent's only the ``most`` options with the lowest bounds are left, where that is given.
    """
    keep = np.ones(problem.num_options, dtype=bool)
    at_least, outside = learned(search).at_least, np.inf
    if search.choice is not None and search.objective is not None and at_least is not None:
        outside = search.objective
        lowest = at_least == np.minimum.reduceat(at_least, problem.group_offsets[:-1])[problem.group_of]
        rivals = np.flatnonzero((at_least <= search.objective) & ~lowest)
        if most is not None and len(rivals) > most:
            outside, rivals = -np.inf, rivals[np.argpartition(at_least[rivals], most)[:most]]
            lowest[problem.flat(search.choice)] = True
        keep = lowest
        keep[rivals] = True
    return restrict(problem, keep, outside=outside)


def certify(problem: Problem, search: Search) -> Restriction:
    """The open part, made smaller by the semidefinite bound where that is within reach; its bound is handed in.

    The relaxation's shares, rounded, repaired and polished, are offered. What is open may then be small enough for
    another, stronger bound.
    """
    part = open_part(problem, search)
    while problem.pairs and not (search.proven() or search.expired()):
        options = part.problem.num_options
        seconds = min(CERTIFY_SHARE * search.remaining(), CERTIFY_S)
        few = options <= MAX_OPTIONS and least_seconds(options) <= seconds
        certified = learned(search).certified
        if not few or (certified and options > SHRUNK * certified):
            break
        learn_certified(search, options)
        incumbent = np.inf if search.objective is None else search.objective
        with search.phase("semidefinite_s"):
            begun = search.elapsed()
            bound = semidefinite_bound(part.problem, target=incumbent, time_limit=seconds)
            if search.elapsed() - begun >= seconds:
                search.cut_short()
        search.raise_bound(part.lift_bound(bound.value))
        at_least = np.full(problem.num_options, -np.inf)
        at_least[part.options] = bound.at_least
        learn_option_bounds(search, at_least)
        likely = np.lexsort((-bound.share, part.problem.group_of))[part.problem.group_offsets[:-1]]
        feasible = repair(part.problem, likely - part.problem.group_offsets[:-1])
        if feasible is not None:
            search.offer(part.lift(polish(part.problem, feasible, search.remaining())))
        part = open_part(problem, search)
    return part
