"""Scale the objective of a problem. Solvers work in a unit in which its numbers are about 1."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem
from formulations.reductions.base import Choice, Reduction


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling(Reduction):
    """A problem whose objective is ``factor`` times the original's; choices and their feasibility do not change."""

    same_choices: ClassVar[bool] = True
    original: Problem
    problem: Problem
    factor: float

    @property
    def unit(self) -> float:
        """``1 / factor``."""
        return 1.0 / self.factor

    def lift(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lower(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lift_bound(self, bound: float) -> float:
        """Return the bound in the original's unit."""
        return bound / self.factor


def scaled(problem: Problem, factor: float | None = None) -> Scaling:
    """Multiply every number of the objective (costs, pair terms, offset) by a factor.

    Args:
        problem: any problem.
        factor: a positive number; None chooses one that makes the numbers about 1 (see `objective_size`).

    Raises:
        InvalidProblemError: ``factor`` is not positive and finite, or a scaled number overflows a float.

    >>> problem = Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {})
    >>> scaled(problem).problem.cost.tolist(), scaled(problem, 2).problem.cost.tolist()
    ([0.0, 1.0], [0.0, 6.0])
    """
    factor = 1.0 / objective_size(problem) if factor is None else float(factor)
    if not (np.isfinite(factor) and factor > 0):
        raise InvalidProblemError(f"the scaling factor must be a positive finite number, found {factor!r}")
    sparse, rows = problem.pairs.sparse, problem.pairs.factor
    with np.errstate(over="ignore"):  # an overflow is refused below, with the name of the numbers
        cost, offset = problem.cost * factor, problem.offset * factor
        rows = None if rows is None else rows * np.sqrt(factor)
        if rows is not None:
            rows.flags.writeable = False  # so that `PairTerms` need not copy it
        pairs = PairTerms(sparse=None if sparse is None else sparse * factor, factor=rows)
    for name, numbers in (("cost", cost), ("offset", offset)):
        if not np.isfinite(numbers).all():
            raise InvalidProblemError(f"{name} must be finite; times {factor:g} it overflows a float")
    cost.flags.writeable = False
    return Scaling(
        original=problem, problem=problem.derived(cost=cost, pairs=pairs, offset=float(offset)), factor=factor
    )


def normal_form(problem: Problem) -> Reduction:
    """Return the problem as back ends see it: objective numbers about 1, and fixed uses subtracted from the budgets.

    >>> problem = Problem(["a"], [["keep", "4 bit"]], [0, 3], {"bytes": [8, 4]}, {"bytes": 10}, fixed={"bytes": 6})
    >>> stated = normal_form(problem).problem
    >>> stated.cost.tolist(), round(stated.budgets["bytes"], 9), stated.evaluate([1]).usage
    ([0.0, 1.0], 4.0, {'bytes': 4.0})
    """
    reduction = scaled(problem)
    return replace(reduction, problem=reduction.problem.without_fixed())


def objective_size(problem: Problem) -> float:
    """Return the most that a single decision or pair can change the objective; 1 if all numbers are zero.

    >>> objective_size(Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {}))
    3.0
    """
    starts = problem.group_offsets[:-1]
    spread = np.maximum.reduceat(problem.cost, starts) - np.minimum.reduceat(problem.cost, starts)
    sizes = [float(spread.max())]
    if problem.pairs.num_sparse:
        sizes.append(float(np.abs(problem.pairs.sparse.data).max()))
    if problem.pairs.factor is not None and problem.pairs.rank:
        sizes.append(float(np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor).max()))
    size = max(sizes)
    return size if size > 0 and np.isfinite(1.0 / size) else 1.0
