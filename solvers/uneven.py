"""Search problems whose numbers are too far apart for one scale, and keep their proofs honest.

Back ends work on a problem scaled by its largest number. A cost of 1e12 that forbids an option then leaves few digits
for costs of about 1, and two choices that differ by 1 look equal. Two things prevent false proofs:

* What no choice as good as a known one contains is left out before scaling (`formulations.reductions.cut_off`).
* After a run, the rounding error of the problem that it searched is compared with the numbers in its answer. If it
  matters, the proof is withdrawn, the better choices of the run cut off more, and the smaller problem is searched. If
  that is no smaller, the bound stays lower by the rounding error.

Other problems are searched once, unchanged.
"""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.reductions.base import Choice
from formulations.reductions.cut_off import cut_off
from formulations.reductions.restriction import Restriction, restrict
from solvers.presolved import cheap
from solvers.search import PROOF_TOLERANCE, Search, cheapest
from solvers.sub_search import SubSearch

UNEVEN, SMALL = 1e10, 0.1
"""A problem is uneven if its largest number is more than this times this quantile of its numbers."""

FIRST_SHARE = 0.1
"""Maximum fraction of the remaining time for a first choice."""

RUNS = 4
"""Maximum number of runs, of which each but the first searches at most half the range of numbers."""

DOUBT = "the problem's numbers are too far apart: rounding errors leave the answer unproven"
"""Why a run ends before the answer is proven, for ``details["stopped"]``."""

Attack = Callable[[Search], None]


def search_evenly(search: Search, attack: Attack, *, reducible: bool) -> None:
    """Run ``attack`` until what it proves is proven in spite of rounding errors, or no better proof is possible.

    Args:
        search: the search of the stated problem.
        attack: function that runs a back end.
        reducible: whether the back end may get a reduced problem.
    """
    part: Restriction | None = None
    sizes = _sizes(search.problem)
    if reducible and _uneven(sizes):
        with search.phase("presolve_s"):
            first = first_choice(search.problem, FIRST_SHARE * search.remaining())
        if first is not None:
            search.offer(first)
        part = _part(search)
    error = _rounding(search.problem, sizes) if part is None else rounding_error(part.problem)
    for _ in range(RUNS):
        problem = search.problem if part is None else part.problem
        try:
            _run(search, part, attack)
        finally:  # also if Ctrl-C ends the run
            claimed = search.proven()
            honest = _negligible(error, search, problem)
            if not honest:
                search.doubt(error)
        if honest or not claimed:
            return
        smaller = _part(search) if reducible and not search.expired() else None
        if smaller is None or (left := rounding_error(smaller.problem)) > 0.5 * error:
            break
        part, error = smaller, left
    search.details["stopped"] = DOUBT


def _run(search: Search, part: Restriction | None, attack: Attack) -> None:
    if part is None:
        attack(search)
        return
    search.details["cut_off"] = {"options": [search.problem.num_options, part.problem.num_options]}
    hint = None if search.initial is None else part.lower(search.initial)
    inner = SubSearch(part, search, initial=hint)
    known = None if search.choice is None else part.lower(search.choice)
    if known is not None:
        inner.begin_from(known)
    attack(inner)


def _part(search: Search) -> Restriction | None:
    """Return the part of the problem with all choices better than the incumbent; None without an incumbent."""
    return None if search.choice is None else cut_off(search.problem, search.choice)


def rounding_error(problem: Problem) -> float:
    """Estimate the rounding error of sums over the problem's groups, in the unit of its objective."""
    return _rounding(problem, _sizes(problem))


def _rounding(problem: Problem, sizes: NDArray[np.float64]) -> float:
    digits = np.finfo(float).eps * (16.0 + 4.0 * np.sqrt(problem.num_groups))
    return float(digits * sizes.max(initial=0.0))


def _negligible(error: float, search: Search, problem: Problem) -> bool:
    """Whether an error is small relative to the answer's terms, or to the smallest difference in the problem."""
    if search.bound is None:
        return True
    if search.choice is None:
        return search.proven() or error <= PROOF_TOLERANCE * abs(search.bound)
    return error <= search.tolerance() or error <= PROOF_TOLERANCE * _least_difference(problem)


def _least_difference(problem: Problem) -> float:
    """Return the smallest difference of costs in a group, or the smallest pair term if that is smaller."""
    order = np.lexsort((problem.cost, problem.group_of))
    differences = np.diff(problem.cost[order])[np.diff(problem.group_of[order]) == 0]
    sizes = np.concatenate([differences, *_pair_sizes(problem)])
    return float(sizes[sizes > 0.0].min(initial=np.inf)) if (sizes > 0.0).any() else 0.0


def _sizes(problem: Problem) -> NDArray[np.float64]:
    """Return the sizes of the objective's numbers, without zeros; costs are compared with the least of their group."""
    least = np.minimum.reduceat(problem.cost, problem.group_offsets[:-1])
    sizes = np.concatenate([problem.cost - least[problem.group_of], *_pair_sizes(problem)])
    return sizes[sizes > 0.0]


def _pair_sizes(problem: Problem) -> list[NDArray[np.float64]]:
    """Return the sizes of the sparse pair terms, and of the factor's terms."""
    pairs = problem.pairs
    sparse = [np.abs(pairs.sparse.data)] if pairs.num_sparse else []
    return sparse if pairs.factor is None else [*sparse, np.einsum("vr,vr->v", pairs.factor, pairs.factor)]


def uneven(problem: Problem) -> bool:
    """Whether the largest number of the objective leaves too few digits for small ones.

    >>> uneven(Problem(["a"], [["x", "y", "z"]], [0.0, 1.0, 1e12], {}, {}))
    True
    """
    return _uneven(_sizes(problem))


def _uneven(sizes: NDArray[np.float64]) -> bool:
    if not len(sizes):
        return False
    small = int(SMALL * len(sizes))
    return bool(sizes.max() / UNEVEN > np.partition(sizes, small)[small])  # a product could overflow


def first_choice(problem: Problem, seconds: float) -> Choice | None:
    """Find a feasible choice whose largest cost is about as small as possible; None if none is found in ``seconds``."""
    least = np.minimum.reduceat(problem.cost, problem.group_offsets[:-1])
    above = problem.cost - least[problem.group_of]
    levels = np.append(-np.inf, np.unique(np.ceil(np.log10(above[above > 0.0]))))
    low, high, found = 0, len(levels), None
    end = time.perf_counter() + seconds
    while low < high and time.perf_counter() < end:  # the smallest power of ten with a feasible choice
        middle = (low + high) // 2
        part = restrict(problem, above <= 10.0 ** levels[middle])
        choice = _feasible(part.problem, end - time.perf_counter())
        if choice is None:
            low = middle + 1
        else:
            high, found = middle, part.lift(choice)
    return found


def _feasible(problem: Problem, seconds: float) -> Choice | None:
    """Find a feasible choice, improved by single switches and by pairs of them."""
    from solvers.kernels.local_search import polish  # compiled code, imported only when used
    from solvers.paired_budgets import Within

    if problem.paired_budgets:
        alone = Search(problem, solver="first choice", time_limit=max(seconds, 1e-9))
        Within(problem, alone).offer(cheapest(problem))
        return alone.choice
    choice = cheap(problem)
    return None if choice is None else polish(problem, choice, seconds)
