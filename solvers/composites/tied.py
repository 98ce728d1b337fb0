"""`TiedSolver`: run a solver on a problem in which groups that must take the same option are joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from formulations.reductions.tie import tie
from solvers.base import Search, SubSearch
from solvers.composites.wrapper import Wrapper


@dataclass(frozen=True)
class TiedSolver(Wrapper):
    """Run a solver on the problem with each set of groups joined, so that all groups of a set take the same option.

    A bound of the smaller problem holds only for choices that satisfy the ties.

    Attributes:
        tied: sets of group names, same as in `formulations.reductions.tie.tie`.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["4 bits", "8 bits"]] * 2, [3, 0, 2, 0], {"bytes": [1, 2] * 2}, {"bytes": 3})
    >>> solve(problem, "brute-force").choice.tolist()
    [1, 0]
    >>> solve(problem, TiedSolver("brute-force", tied=[("a", "b")])).choice.tolist()
    [0, 0]
    """

    name: ClassVar[str] = "tied"
    summary: ClassVar[str] = "a solver on groups that must take the same option"
    presolved: ClassVar[bool] = False  # ties refer to the original group names
    tied: Sequence[Sequence[str]] = ()

    def run(self, problem: Problem, search: Search) -> None:
        """Run the inner solver on the smaller problem."""
        joined, solver = tie(problem, self.tied, binding=True), self.inner
        inner = SubSearch(joined, search, apart=True, seed=search.seed, solver=solver.name)
        solver.run(joined.problem, inner)
        search.details["tied"] = inner.summary()
