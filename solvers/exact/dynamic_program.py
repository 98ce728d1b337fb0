"""`dp`: dynamic programming over Pareto lists, exact for linear problems with any number of budgets."""

from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search, Solver
from solvers.bounds.duality import raise_dual_bound
from solvers.bounds.pareto_lists import prove
from solvers.bounds.warm import warm_bounds
from solvers.kernels.repair import repair

MAX_STATES = 2_000_000
"""Maximum length of a Pareto list (about 100 MB with one budget)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicProgram(Solver):
    """Dynamic programming over Pareto lists of (usage, cost), kept short by a dual bound and an incumbent.

    Uses are never rounded, so budgets hold exactly and the result is optimal. If a list grows beyond `MAX_STATES`, the
    best choice so far is returned with its bound, as FEASIBLE.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "dp")
    >>> solution.objective, str(solution.status)
    (1.0, 'OPTIMAL')
    """

    name: ClassVar[str] = "dp"
    summary: ClassVar[str] = "dynamic programming over Pareto lists; problems without pair terms"
    exact: ClassVar[bool] = True
    native_pairs: ClassVar[bool] = False

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_bounds()

    def run(self, problem: Problem, search: Search) -> None:
        """Compute a bound and a repaired choice for pruning, then the lists."""
        bound = raise_dual_bound(problem, search, 0.5)
        if search.proven():
            return
        feasible = repair(problem, bound.choice, search.expired)
        if feasible is not None:
            search.offer(feasible)
        if not prove(problem, search, bound, max_states=MAX_STATES) and not (search.expired() or search.cut):
            search.details["stopped"] = f"a Pareto list grew beyond {MAX_STATES:,} states"
