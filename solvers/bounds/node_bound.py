"""The semidefinite bound of a node of a branch and bound, by the method that suits the node's problem."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from solvers.bounds.semidefinite import Lift, SemidefiniteBound, semidefinite_bound
from solvers.bounds.sign_bound import SignBound, SignState, sign_bound

NodeBound = SignBound | SemidefiniteBound
"""A proven lower bound; the state of a `SignBound` also serves child nodes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxed:
    """Where the last semidefinite bound of a search ended: flags ``(V,)`` of its options, and its state."""

    keep: NDArray[np.bool_]
    state: SignState | Lift


def node_bound(
    problem: Problem,
    *,
    target: float = np.inf,
    time_limit: float = np.inf,
    start: SignState | Lift | None = None,
) -> NodeBound:
    """Compute a semidefinite bound: `sign_bound` if possible, else `semidefinite_bound`.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> round(node_bound(problem).value, 2)
    1.0
    """
    if takes_signs(problem):
        begin = start if isinstance(start, SignState) else None
        return sign_bound(problem, target=target, time_limit=time_limit, start=begin)
    lift = start if isinstance(start, Lift) else None
    return semidefinite_bound(problem, target=target, time_limit=time_limit, start=lift)


def takes_signs(problem: Problem) -> bool:
    """Whether every group has two options and no budget is given."""
    return not problem.budgets and bool((np.diff(problem.group_offsets) == 2).all())
