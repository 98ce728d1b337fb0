"""The choice of a solution that a benchmark cannot go on without."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers import Solution


class Found(NamedTuple):
    """A choice ``(G,)`` and its objective."""

    choice: NDArray[np.int64]
    objective: float


def found(solution: Solution) -> Found:
    """Choice and objective of a solution.

    Raises:
        RuntimeError: it has no choice.

    >>> from formulations import Problem
    >>> from solvers import judge
    >>> problem = Problem(["a"], [["keep", "4 bit"]], [0, 3], {"bytes": [8, 1]}, {"bytes": 4})
    >>> found(judge(problem, [1])).objective
    3.0
    >>> found(judge(problem, [0]))
    Traceback (most recent call last):
    ...
    RuntimeError: given found no choice within the budgets: UNKNOWN, COMPLETED
    """
    if solution.choice is None or solution.objective is None:
        raise RuntimeError(
            f"{solution.solver} found no choice within the budgets: {solution.status}, {solution.stop_reason}"
        )
    return Found(solution.choice, solution.objective)
