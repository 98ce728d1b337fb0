"""`Tied`: a solver on groups that must take the same option, joined into one each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from formulations.reductions.tie import tie
from solvers.base import Search, SubSearch
from solvers.composites.wrapper import Wrapper


@dataclass(frozen=True)
class Tied(Wrapper):
    """Runs a solver on the problem with each set of groups joined: every answer has one option a set.

    A bound of the smaller problem is one of all choices that keep to the ties, and of no others.

    Attributes:
        tied: sets of group names, as of `formulations.reductions.tie.tie`.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["4 bits", "8 bits"]] * 2, [3, 0, 2, 0], {"bytes": [1, 2] * 2}, {"bytes": 3})
    >>> solve(problem, "brute-force").choice.tolist()
    [1, 0]
    >>> solve(problem, Tied("brute-force", tied=[("a", "b")])).choice.tolist()
    [0, 0]
    """

    name: ClassVar[str] = "tied"
    summary: ClassVar[str] = "a solver on groups that must take the same option"
    presolved: ClassVar[bool] = False  # its groups go by the names that they were stated with
    tied: Sequence[Sequence[str]] = ()

    def run(self, problem: Problem, search: Search) -> None:
        """Run the inner solver on the smaller problem."""
        joined, solver = tie(problem, self.tied, binding=True), self.inner
        inner = SubSearch(joined, search, apart=True, seed=search.seed, solver=solver.name)
        solver.run(joined.problem, inner)
        search.details["tied"] = inner.summary()
