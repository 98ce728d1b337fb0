"""Rules from the literature for choosing ranks, on the tables of any problem, as baselines for solvers.

Each rule has one number, which is adjusted until the budgets are met, so that all rules are compared at equal budget.
None of them considers pair terms or uses up the rest of a budget. The returned choice meets every budget; if the rule
gives no such choice, the result is None.

* `uniform`: the same fraction of its dense use for every layer.
* `threshold`: the smallest option whose error is at most t. With relative tail energies as errors this is the energy
  threshold; with relative largest dropped singular values it is ALDS (arXiv 2107.11442), which minimises the largest
  error.
* `penalty`: the option with the smallest ``error + α·use`` in every layer, the compression step of LC
  (arXiv 2007.05580).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from formulations import InvalidProblemError, Problem
from solvers.kernels.moves import Floats, Integers

STEPS = 100
"""Number of bisection steps for the penalty."""


def uniform(problem: Problem, resource: str) -> Integers | None:
    """Limit every group to the same fraction of its largest use of ``resource``, the largest that meets the budgets.

    Each group takes its largest option within the limit, or its smallest option if none is within it.

    Raises:
        InvalidProblemError: the resource is unknown.

    >>> problem = Problem(["a", "b"], [["small", "big"]] * 2, [3, 0, 1, 0], {"bytes": [1, 4, 1, 2]}, {"bytes": 4})
    >>> uniform(problem, "bytes").tolist()
    [0, 0]
    """
    use = _resource(problem, resource)
    most = np.maximum.reduceat(use, problem.group_offsets[:-1])[problem.group_of]
    share = use / np.where(most > 0, most, 1.0)

    def choice_at(limit: float) -> Integers:
        within = share <= limit
        return _least(problem, np.where(within, -share, 2.0 + share), problem.cost)

    return _loosest(problem, np.unique(share)[::-1], choice_at)


def threshold(problem: Problem, error: ArrayLike | None = None) -> Integers | None:
    """Take in every group the smallest option whose error is at most t, for the smallest t that meets the budgets.

    Args:
        problem: any problem; the uses of several budgets are summed as fractions of the budgets.
        error: ``(V,)`` error of each option; None takes the costs.

    Raises:
        InvalidProblemError: ``error`` does not have one entry per option.

    >>> problem = Problem(["a", "b"], [["small", "big"]] * 2, [3, 0, 1, 0], {"bytes": [1, 4, 1, 2]}, {"bytes": 5})
    >>> threshold(problem).tolist()
    [1, 0]
    """
    errors = _errors(problem, error)
    use = _weighed_use(problem)

    def choice_at(limit: float) -> Integers:
        return _least(problem, np.where(errors <= limit, use, np.inf), errors)

    return _loosest(problem, np.unique(errors), choice_at)


def penalty(problem: Problem, resource: str, error: ArrayLike | None = None) -> Integers | None:
    """Take in every group the option with the smallest ``error + α·use``, for the smallest α ≥ 0 within the budgets.

    Raises:
        InvalidProblemError: the resource is unknown, or ``error`` does not have one entry per option.

    >>> problem = Problem(["a", "b"], [["small", "big"]] * 2, [6, 0, 1, 0], {"bytes": [1, 4, 1, 2]}, {"bytes": 5})
    >>> penalty(problem, "bytes").tolist()
    [1, 0]
    """
    errors, use = _errors(problem, error), _resource(problem, resource)

    def choice_at(price: float) -> Integers:
        return _least(problem, errors + price * use, use)

    if problem.evaluate(free := choice_at(0.0)).feasible:
        return free
    steps = np.diff(np.unique(use))
    high = 2 * float(np.ptp(errors)) / float(steps.min()) if len(steps) else 1.0  # above this only the use matters
    if not problem.evaluate(choice_at(high)).feasible:
        return None
    low = 0.0
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if problem.evaluate(choice_at(middle)).feasible else (middle, high)
    return choice_at(high)


def _loosest(problem: Problem, limits: Floats, choose: Callable[[float], Integers]) -> Integers | None:
    """Return the choice at the first limit, in order of falling use, that meets the budgets; all later ones do too."""
    low, high = 0, len(limits)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.evaluate(choose(limits[middle])).feasible else (middle + 1, high)
    return choose(limits[low]) if low < len(limits) else None


def _least(problem: Problem, key: Floats, among_equals: Floats) -> Integers:
    """Return the local option with the smallest key in every group."""
    order = np.lexsort((among_equals, key, problem.group_of))
    starts = problem.group_offsets[:-1]
    return order[starts] - starts


def _weighed_use(problem: Problem) -> Floats:
    use = np.zeros(problem.num_options)
    for name, budget in problem.budgets.items():
        use += problem.resources[name] / (budget or 1.0)
    return use


def _resource(problem: Problem, name: str) -> Floats:
    if name not in problem.resources:
        raise InvalidProblemError(f"no resource is called {name!r}; the problem has: {', '.join(problem.resources)}")
    return problem.resources[name]


def _errors(problem: Problem, error: ArrayLike | None) -> Floats:
    errors = problem.cost if error is None else np.asarray(error, dtype=np.float64)
    if errors.shape != (problem.num_options,):
        raise InvalidProblemError(f"give one error for each of {problem.num_options} options, found {errors.shape}")
    return errors
