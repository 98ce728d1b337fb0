"""`semidefinite`: branch and bound with semidefinite bounds, for problems whose pair terms all interact.

A node is a set of open options. Its bound comes from `sign_bound` if every group has two options and there is no
budget (QUBO, max-cut), else from `semidefinite_bound`. Options whose own bound reaches the incumbent are closed, and
the group that the relaxation leaves most undecided is split between two child nodes. The node with the smallest bound
is treated first, so the smallest bound of all nodes is a bound of the problem at any time. If all objectives are
multiples of a step, a node is closed as soon as its bound exceeds the incumbent minus one step.
"""

import heapq
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.reductions.restriction import Restriction, restrict
from solvers.base import Search, SubSearch
from solvers.bounds.learned import learn_option_bounds
from solvers.bounds.node_bound import NodeBound, Relaxed, node_bound, takes_signs
from solvers.bounds.semidefinite import Lift
from solvers.bounds.sign_bound import SignState
from solvers.bounds.signs import SignForm
from solvers.exact.base import Exact
from solvers.exact.brute_force import BruteForce, warm_enumeration
from solvers.heuristic.anneal import Anneal
from solvers.heuristic.lagrangian import begin, open_part
from solvers.kernels.local_search import polish
from solvers.kernels.moves import Floats
from solvers.kernels.repair import repair
from solvers.search import num_choices

MAX_OPTIONS = 1000
"""Maximum number of options, same as for `lagrangian`'s semidefinite bound."""

ANNEAL_SHARE = 0.05
"""Fraction of the time for a first good choice."""

FEW_CHOICES = 2.0**15
"""Number of choices of a node that are enumerated."""

ROUNDING = 1e-12
"""Relative size of rounding errors."""

LATTICE = 2.0**52
"""Largest number for which sums of whole numbers are exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A part of the choices: the open options, and what is known of them.

    Attributes:
        keep: ``(V,)`` flags of the options.
        bound: a proven lower bound of its choices.
        state: where an earlier bound, of this node or its parent, ended.
    """

    keep: NDArray[np.bool_]
    bound: float
    state: Relaxed | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The open nodes of a search that the time limit ended."""

    problem: Problem
    nodes: tuple[Node, ...]
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Semidefinite(Exact):
    """Branch and bound with semidefinite bounds.

    >>> from solvers import solve
    >>> from formulations.generators.families import member
    >>> problem = member("random_max_cut", {"vertices": 20, "density": 0.5, "seed": 0})
    >>> str(solve(problem, "semidefinite", seed=0).status)
    'OPTIMAL'
    """

    name: ClassVar[str] = "semidefinite"
    summary: ClassVar[str] = "branch and bound with semidefinite bounds; dense pair terms, up to 1,000 options"

    def prepare(self) -> None:
        """Compile the inner loops."""
        Exact.prepare(self)
        warm_enumeration()

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with too many options."""
        if problem.num_options <= MAX_OPTIONS:
            return ""
        return (
            f"solver 'semidefinite' takes up to {MAX_OPTIONS:,} options, this problem has {problem.num_options:,}; "
            "use 'auto', 'lagrangian' or 'anneal'"
        )

    def run(self, problem: Problem, search: Search) -> None:
        """Find a bound and a good choice, then branch until no node is left or the time is over."""
        if search.choice is None or search.bound is None:
            begin(problem, search)
            with search.at_most(ANNEAL_SHARE * search.remaining()):
                Anneal().run(problem, search)
        if not (search.proven() or search.expired()):
            with search.phase("branch_s"):
                branch(problem, search)


def branch(problem: Problem, search: Search) -> None:
    """Treat nodes until none is left or the time is over; a later call resumes."""
    tree = search.learned(Tree)
    if tree is None or tree.problem is not problem:
        tree = Tree(problem=problem, nodes=(_root(problem, search),), count=0)
    count, numbers, step = tree.count, itertools.count(), objective_step(search)
    heap = [(node.bound, next(numbers), node) for node in tree.nodes]
    heapq.heapify(heap)
    while heap and not (search.proven() or search.expired()):
        node = heapq.heappop(heap)[2]
        if node.bound >= _target(search, step):
            continue
        children = _treat(problem, node, search, step, first=not count)
        if not count and children:
            _anneal_rest(problem, children, search)
        count += 1
        for child in children:
            heapq.heappush(heap, (child.bound, next(numbers), child))
        if heap:
            search.raise_bound(min(heap[0][0], np.inf if search.objective is None else search.objective))
    search.details["nodes"] = count
    if not heap:
        search.close()
    search.learn(Tree(problem=problem, nodes=tuple(entry[2] for entry in heap), count=count))


def objective_step(search: Search) -> float:
    """Return a number of which all differences of objectives are multiples, in this search's unit; 0 if unknown."""
    problem = search.stated.problem
    if problem.pairs.factor is not None or problem.paired_budgets:
        return 0.0
    products = np.zeros(0) if problem.pairs.sparse is None else problem.pairs.sparse.data
    numbers = np.concatenate([problem.cost, products])
    if np.abs(numbers).sum() >= LATTICE or (numbers != np.rint(numbers)).any():
        return 0.0
    return float(np.gcd.reduce(np.abs(numbers).astype(np.int64))) / search.unit


def _target(search: Search, step: float) -> float:
    """Return the bound from which a node cannot hold a better choice."""
    if search.objective is None:
        return np.inf
    return search.objective - 0.999 * step if step else search.objective - 0.5 * search.tolerance()


def _root(problem: Problem, search: Search) -> Node:
    """Return the node of everything that bounds and incumbent leave open, without mirror images."""
    keep = open_part(problem, search).keep
    if takes_signs(problem) and keep.all():
        matrix = np.abs(SignForm.of(problem).matrix)
        if matrix[0].max() <= ROUNDING * matrix.max():  # a choice and its opposite have the same objective
            keep[2 * int(np.argmax(matrix[1:].sum(axis=1))) + 1] = False
    bound = -np.inf if search.bound is None else search.bound
    return Node(keep=keep, bound=bound, state=search.learned(Relaxed))


def _treat(problem: Problem, node: Node, search: Search, step: float, *, first: bool) -> list[Node]:
    """Bound a node, close options, and return its child nodes (none if it holds no better choice)."""
    keep = _fitting(problem, node.keep)
    if keep is None or _enumerated(problem, keep, search):
        return []
    part = restrict(problem, keep)
    start = None if node.state is None else _handed_down(problem, node.state, keep)
    bound = node_bound(part.problem, target=_target(search, step), time_limit=search.remaining(), start=start)
    _round(part, bound, search)
    if first and problem.budgets:  # the first node holds every better choice, and no mirror images are left out
        at_least = np.full(problem.num_options, -np.inf)
        at_least[part.options] = bound.at_least
        learn_option_bounds(search, at_least)
    value, target = max(node.bound, bound.value), _target(search, step)
    if value >= target:
        return []
    state = Relaxed(keep=keep.copy(), state=bound.state)
    if search.expired():
        return [Node(keep=keep, bound=value, state=state)]
    keep[part.options[bound.at_least >= target]] = False
    if len(np.unique(problem.group_of[keep])) < problem.num_groups or _enumerated(problem, keep, search):
        return []
    share = np.ones(problem.num_options)
    share[part.options] = bound.share
    handed = state if isinstance(bound.state, SignState) else None  # matrices of the other method take megabytes
    return [Node(keep=half, bound=value, state=handed) for half in _halves(problem, keep, share)]


def _fitting(problem: Problem, keep: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Return the options with which the budgets can be met, given the least use of the others; None if there are none.

    Options are closed only if they exceed a budget by more than rounding errors.
    """
    keep, starts = keep.copy(), problem.group_offsets[:-1]
    for name, budget in problem.budgets.items():
        use = np.where(keep, problem.resources[name], np.inf)
        least = np.minimum.reduceat(use, starts)
        room = budget * (1 + ROUNDING) - problem.fixed.get(name, 0.0) - least.sum()
        keep &= use - least[problem.group_of] <= room
        if room < 0:
            return None
    return keep


def _enumerated(problem: Problem, keep: NDArray[np.bool_], search: Search) -> bool:
    """Try all choices of a node if there are only a few; return whether that was done."""
    part = restrict(problem, keep)
    if num_choices(part.problem) > FEW_CHOICES:
        return False
    inner = SubSearch(part, search)
    BruteForce().run(part.problem, inner)
    return inner.closed or not search.expired()


def _anneal_rest(problem: Problem, children: list[Node], search: Search) -> None:
    """Anneal among the options that the first node leaves open, which are few if its bound is good."""
    keep = np.logical_or.reduce([child.keep for child in children])
    if search.choice is not None:
        keep[problem.flat(search.choice)] = True
    part = restrict(problem, keep)
    start = None if search.choice is None else part.lower(search.choice)
    with search.at_most(ANNEAL_SHARE * search.remaining()):
        Anneal().run(part.problem, SubSearch(part, search, initial=start))


def _round(part: Restriction, bound: NodeBound, search: Search) -> None:
    """Offer the choice of the largest shares, repaired and polished."""
    starts = part.problem.group_offsets[:-1]
    likely = np.lexsort((-bound.share, part.problem.group_of))[starts]
    feasible = repair(part.problem, likely - starts, search.expired)
    if feasible is not None:
        search.offer(part.lift(polish(part.problem, feasible, search.remaining())))


def _handed_down(problem: Problem, before: Relaxed, keep: NDArray[np.bool_]) -> SignState | Lift:
    """Return the state of an earlier bound for the options ``keep``."""
    if isinstance(before.state, Lift):
        return before.state
    starts = problem.group_offsets[:-1]
    were_open = np.flatnonzero(np.add.reduceat(before.keep.astype(np.int64), starts) == 2)
    still_open = np.add.reduceat(keep.astype(np.int64), starts)[were_open] == 2
    signs = np.where(keep[starts[were_open] + 1], 1, -1)
    return before.state.restricted(np.flatnonzero(still_open), signs)


def _halves(problem: Problem, keep: NDArray[np.bool_], share: Floats) -> list[NDArray[np.bool_]]:
    """Split the group whose largest share is smallest: its likeliest option, and the other ones."""
    starts, share = problem.group_offsets[:-1], np.where(keep, share, -1.0)
    largest = np.maximum.reduceat(share, starts)
    several = np.add.reduceat(keep.astype(np.int64), starts) > 1
    group = int(np.argmin(np.where(several, largest, np.inf)))
    likeliest = starts[group] + int(np.argmax(share[starts[group] : problem.group_offsets[group + 1]]))
    taken, left = keep.copy(), keep.copy()
    taken[problem.group_of == group] = False
    taken[likeliest], left[likeliest] = True, False
    return [taken, left]
