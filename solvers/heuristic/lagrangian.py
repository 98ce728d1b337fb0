"""`lagrangian`: the dual's choice, repaired and improved, with the dual's bound and the budgets' prices.

Linear problems are usually solved with proof: the options that bound and incumbent leave open are decided by Pareto
lists (`solvers.bounds.pareto_lists`). With pair terms, the dual's choice is annealed among the options that the bound
leaves open, and the gap limits the distance of the result from the optimum.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from formulations.reductions.restriction import Restriction, restrict
from solvers.base import Search, Solver, SubSearch
from solvers.bounds.duality import DualBound, raise_dual_bound
from solvers.bounds.learned import learn, learn_option_bounds, learned
from solvers.bounds.node_bound import Relaxed, node_bound
from solvers.bounds.pareto_lists import prove
from solvers.bounds.semidefinite import useful_within
from solvers.bounds.warm import warm_bounds
from solvers.heuristic.anneal import Anneal
from solvers.kernels.local_search import polish
from solvers.kernels.repair import repair

MAX_STATES = 200_000
"""Maximum length of a Pareto list in the proof of a linear problem (`dp` allows longer lists)."""

CORES = (250, 1000, 4000, 16_000)
"""Maximum number of open options that are annealed in one round."""

MOVES = 2_000_000
"""Number of moves for one of six choices in one round, limited to 200 to 2000 per group (about 0.1 s)."""

MAX_OPTIONS = 1000
"""Maximum number of open options for which the semidefinite bound is tried."""

MAX_BUDGETS = 16
"""Maximum number of budgets for which it is tried; those of a linearisation (a budget an option) gain little by it."""

CERTIFY_SHARE, CERTIFY_S = 0.3, 20.0
"""Maximum fraction of the remaining time for the semidefinite bound, and its time in seconds without a limit."""

SHRUNK = 0.9
"""The semidefinite bound is computed again when at most this fraction of the options is still open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian(Solver):
    """Lagrangian relaxation: bound, prices and a feasible choice; linear problems are almost always proven.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "lagrangian")
    >>> solution.objective, str(solution.status)
    (1.0, 'OPTIMAL')
    """

    name: ClassVar[str] = "lagrangian"
    summary: ClassVar[str] = "dual bound and budget prices, the dual's choice repaired and improved; any size"

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_bounds()

    def run(self, problem: Problem, search: Search) -> None:
        """Compute a bound and a choice, and for linear problems the proof."""
        bound = begin(problem, search)
        if search.proven():
            return
        if problem.pairs:
            tighten(problem, search, bound)
            return
        with search.phase("proof_s"):
            prove(problem, search, bound, max_states=MAX_STATES)
        if not search.proven() and not search.expired():
            improve(problem, search, bound)


def begin(problem: Problem, search: Search) -> DualBound:
    """Raise the bound and report a good choice if one is found, as the first step of several solvers."""
    bound = raise_dual_bound(problem, search, 0.4)
    if search.proven():
        return bound
    feasible = repair(problem, bound.choice, search.expired)
    if feasible is not None:
        search.offer(feasible)
    if problem.pairs and not search.proven() and not search.expired():
        improve(problem, search, bound)
    return bound


def tighten(problem: Problem, search: Search, bound: DualBound) -> None:
    """Compute semidefinite bounds, and anneal again if they lead to a better choice."""
    before = search.objective
    certify(problem, search)
    if search.objective is not None and search.objective != before:
        improve(problem, search, bound)


def improve(problem: Problem, search: Search, bound: DualBound) -> None:
    """Anneal among the options that can still improve the incumbent, starting with those with the smallest bounds.

    The dual's choice is usually wrong in only a few groups, which are near a tie, so improvements are found quickly.
    Each better incumbent leaves fewer options open: an option whose reduced cost reaches the gap is in no better
    choice. If the time limit ended an earlier call, the next call resumes from there.
    """
    with search.phase("anneal_s"):
        if search.choice is None:  # without an incumbent no option can be left out
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
                learn(search, searched=(before, CORES[-1] if whole else most))
                if whole:
                    return


def open_part(problem: Problem, search: Search, most: int | None = None) -> Restriction:
    """Return the part of a problem that bounds and incumbent leave open; the whole problem without an incumbent.

    No choice outside this part is better than the incumbent. Every group keeps at least the option with the smallest
    bound and the incumbent's option. If ``most`` is given, only that many further options, with the smallest bounds,
    are kept.
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
    """Return the open part, reduced by the semidefinite bound if the problem is small enough; report this bound.

    The relaxation's solution is rounded, repaired, polished and reported. The open part may then be small enough for
    another, stronger bound.
    """
    part = open_part(problem, search)
    while problem.pairs and not (search.proven() or search.expired()):
        options = part.problem.num_options
        seconds = min(CERTIFY_SHARE * search.remaining(), CERTIFY_S)
        few = options <= MAX_OPTIONS and len(part.problem.budgets) <= MAX_BUDGETS
        certified = learned(search).certified
        if not few or (certified and options > SHRUNK * certified) or not useful_within(seconds, options):
            break
        learn(search, certified=options)
        incumbent = np.inf if search.objective is None else search.objective
        with search.phase("semidefinite_s"):
            begun = search.elapsed()
            bound = node_bound(part.problem, target=incumbent, time_limit=seconds)
            if search.elapsed() - begun >= seconds:
                search.cut_short()
        search.raise_bound(part.lift_bound(bound.value))
        search.learn(Relaxed(keep=part.keep, state=bound.state))
        at_least = np.full(problem.num_options, -np.inf)
        at_least[part.options] = bound.at_least
        learn_option_bounds(search, at_least)
        likely = np.lexsort((-bound.share, part.problem.group_of))[part.problem.group_offsets[:-1]]
        feasible = repair(part.problem, likely - part.problem.group_offsets[:-1], search.expired)
        if feasible is not None:
            search.offer(part.lift(polish(part.problem, feasible, search.remaining())))
        part = open_part(problem, search)
    return part
