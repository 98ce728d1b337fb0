"""`greedy`: take every group's cheapest option, then the cheapest switches per unit of excess until budgets hold."""

from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search, Solver
from solvers.kernels.local_search import polish
from solvers.kernels.repair import repair
from solvers.kernels.warm import warm_descent
from solvers.search import cheapest


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy(Solver):
    """Start with each group's cheapest option, switch options in the order of cost per unit of excess, and descend.

    Every switch considers pair terms. This is the fastest way to a reasonable choice, but proves nothing.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solve(problem, "greedy").choice.tolist()
    [0, 1]
    """

    name: ClassVar[str] = "greedy"
    summary: ClassVar[str] = "cheapest switches per unit of resource until the budgets hold, then a descent; any size"

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_descent()

    def run(self, problem: Problem, search: Search) -> None:
        """Take the cheapest options, repair them, and descend."""
        feasible = repair(problem, cheapest(problem), search.expired)
        if feasible is not None:
            search.offer(feasible)
            if not search.expired():
                search.offer(polish(problem, feasible, search.remaining()))
