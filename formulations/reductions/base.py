"""The base class of reductions: a problem scaled, restricted, tied, split, presolved, or a chain of these.

A `Reduction` holds both problems and the maps between them, so that the reduced problem can be solved without knowing
the original. Guarantees, up to rounding errors of sums:

* ``lower(lift(choice))`` is ``choice``;
* the objective of the lifted choice is that of the choice, times `unit`, plus a constant;
* a feasible choice is lifted to a feasible choice;
* ``lift_bound`` of a proven lower bound is a proven lower bound.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.problem import Problem

Choice = NDArray[np.int64]
"""``(G,)`` local option indices."""


class Reduction(ABC):
    """Two problems, and maps of choices and bounds between them. Subclasses are frozen dataclasses.

    Attributes:
        original: the original problem.
        problem: the reduced problem, to be solved instead.
        same_choices: whether both problems have the same groups and options, so that only numbers differ.
    """

    __slots__ = ()

    original: Problem
    problem: Problem
    same_choices: ClassVar[bool] = False

    @property
    def complete(self) -> bool:
        """Whether an optimal choice of `problem` lifts to an optimal one of `original`, or neither has any."""
        return True

    @property
    def unit(self) -> float:
        """The value of one unit of the reduced problem's objective in units of the original's objective."""
        return 1.0

    @abstractmethod
    def lift(self, choice: ArrayLike) -> Choice:
        """Map a choice of the reduced problem to a choice ``(G,)`` of the original."""

    @abstractmethod
    def lower(self, choice: ArrayLike) -> Choice | None:
        """Map a choice ``(G,)`` of the original to one of the reduced problem; None when it has no counterpart."""

    @abstractmethod
    def lift_bound(self, bound: float) -> float:
        """Return the lower bound on the original that follows from one on the reduced problem; ``-inf`` for none."""

    def then(self, further: "Reduction") -> "Chain":
        """Chain this reduction with a further reduction of its `problem`."""
        return Chain(first=self, second=further)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IdentityReduction(Reduction):
    """The identity reduction, which changes nothing."""

    same_choices: ClassVar[bool] = True
    original: Problem

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The original problem."""
        return self.original

    def lift(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lower(self, choice: ArrayLike) -> Choice:
        """Return the same choice."""
        return np.array(choice, dtype=np.int64)

    def lift_bound(self, bound: float) -> float:
        """Return the same bound."""
        return bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain(Reduction):
    """A reduction followed by a reduction of its reduced problem.

    >>> from formulations.reductions.restriction import restrict
    >>> from formulations.reductions.scaling import scaled
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> part = restrict(problem, np.array([True, False, True, True]))
    >>> chain = part.then(scaled(part.problem, 10.0))
    >>> chain.problem.cost.tolist(), chain.lift([1]).tolist(), chain.lower([0, 1]).tolist(), chain.unit
    ([0.0, 10.0], [0, 1], [1], 0.1)
    """

    first: Reduction
    second: Reduction

    @property
    def original(self) -> Problem:  # type: ignore[override]
        """The original problem of the first reduction."""
        return self.first.original

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The reduced problem of the second reduction."""
        return self.second.problem

    @property
    def same_choices(self) -> bool:  # type: ignore[override]
        """Whether both reductions keep groups and options."""
        return self.first.same_choices and self.second.same_choices

    @property
    def complete(self) -> bool:
        """Whether both reductions are complete."""
        return self.first.complete and self.second.complete

    @property
    def unit(self) -> float:
        """The product of the two units."""
        return self.first.unit * self.second.unit

    def lift(self, choice: ArrayLike) -> Choice:
        """Lift through the second reduction, then the first."""
        return self.first.lift(self.second.lift(choice))

    def lower(self, choice: ArrayLike) -> Choice | None:
        """Lower through the first reduction, then the second."""
        between = self.first.lower(choice)
        return None if between is None else self.second.lower(between)

    def lift_bound(self, bound: float) -> float:
        """Lift the bound through the second reduction, then the first."""
        return self.first.lift_bound(self.second.lift_bound(bound))
