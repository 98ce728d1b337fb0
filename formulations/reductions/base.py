"""A problem seen through another one: scaled, restricted, tied, split, presolved, or a chain of these.

A `Reduction` holds both problems and the ways between them, so that whoever solves the second needs to know nothing of
the first. What always holds, up to the rounding of a sum:

* ``lower(lift(choice))`` is ``choice``;
* the lifted choice has the objective of the choice, times `unit`, plus a constant;
* a choice within the budgets is lifted to one within the budgets;
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
    """Two problems, and how choices and bounds pass between them. Subclasses are frozen dataclasses.

    Attributes:
        original: the problem that was asked.
        problem: the problem to solve instead.
        same_choices: whether the two have the same groups and options, so that only numbers differ.
    """

    __slots__ = ()

    original: Problem
    problem: Problem
    same_choices: ClassVar[bool] = False

    @property
    def complete(self) -> bool:
        """Whether a best choice of `problem`, lifted, is a best one of `original`; without one neither has any."""
        return True

    @property
    def unit(self) -> float:
        """How much of the original's objective one unit of the problem's objective is."""
        return 1.0

    @abstractmethod
    def lift(self, choice: ArrayLike) -> Choice:
        """The original's choice ``(G,)`` for a choice of the problem."""

    @abstractmethod
    def lower(self, choice: ArrayLike) -> Choice | None:
        """The problem's choice for one of the original's ``(G,)``; None when it has no counterpart."""

    @abstractmethod
    def lift_bound(self, bound: float) -> float:
        """The lower bound on the original that follows from one on the problem; ``-inf`` when none does."""

    def then(self, further: "Reduction") -> "Chain":
        """This reduction, followed by one of its `problem`."""
        return Chain(first=self, second=further)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Identity(Reduction):
    """The reduction that changes nothing."""

    same_choices: ClassVar[bool] = True
    original: Problem

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The original."""
        return self.original

    def lift(self, choice: ArrayLike) -> Choice:
        """The same choice."""
        return np.array(choice, dtype=np.int64)

    def lower(self, choice: ArrayLike) -> Choice:
        """The same choice."""
        return np.array(choice, dtype=np.int64)

    def lift_bound(self, bound: float) -> float:
        """The same bound."""
        return bound


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain(Reduction):
    """A reduction of another reduction's problem.

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
        """The problem that the first reduction reduces."""
        return self.first.original

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """The problem that the second reduction leads to."""
        return self.second.problem

    @property
    def same_choices(self) -> bool:  # type: ignore[override]
        """Whether no step changes the choices."""
        return self.first.same_choices and self.second.same_choices

    @property
    def complete(self) -> bool:
        """Whether both reductions are complete."""
        return self.first.complete and self.second.complete

    @property
    def unit(self) -> float:
        """The product of the units."""
        return self.first.unit * self.second.unit

    def lift(self, choice: ArrayLike) -> Choice:
        """Back through the second, then the first."""
        return self.first.lift(self.second.lift(choice))

    def lower(self, choice: ArrayLike) -> Choice | None:
        """Through the first, then the second."""
        between = self.first.lower(choice)
        return None if between is None else self.second.lower(between)

    def lift_bound(self, bound: float) -> float:
        """Back through the second, then the first."""
        return self.first.lift_bound(self.second.lift_bound(bound))
