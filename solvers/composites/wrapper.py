"""The base class of solvers that run another solver; a wrapper has the capabilities of its inner solver.

    solve(problem, MultiStart("sa", starts=4))          compare(problem, ["ga", Polish("ga")])

The inner solver runs on an `inner_search` with a separate incumbent, bound, details and random numbers. All its results
are passed to the outer search, which evaluates them again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from formulations import Problem
from formulations.reductions.base import Choice, IdentityReduction
from solvers.base import Search, Solver, SolverLike, SubSearch
from solvers.run import as_solver

INHERITED = ("native_constraints", "native_pairs", "needs_network", "deterministic", "honours_time_limit", "exact")


def inner_search(
    search: Search,
    solver: Solver,
    *,
    seconds: float | None = None,
    seed: int | None = None,
    initial: Choice | None = None,
) -> SubSearch:
    """Return the search for an inner solver: a separate run on the same problem that reports to the outer search."""
    same = IdentityReduction(original=search.problem)
    return SubSearch(same, search, seconds=seconds, initial=initial, apart=True, seed=seed, solver=solver.name)


@dataclass(frozen=True)
class Wrapper(Solver):
    """Base class of solvers that run another solver.

    Attributes:
        solver: a name, a `Solver` class or instance, or a dimod sampler; part of the name, not an option.
    """

    name: ClassVar[str] = "wrapper"
    summary: ClassVar[str] = "runs another solver"
    solver: SolverLike = "auto"

    def __post_init__(self) -> None:
        inner = self.inner
        object.__setattr__(self, "name", f"{type(self).name}({inner.label})")
        for attribute in INHERITED:
            object.__setattr__(self, attribute, getattr(inner, attribute))
        object.__setattr__(self, "presolved", type(self).presolved and inner.presolved)
        super().__post_init__()

    @property
    def inner(self) -> Solver:
        """The inner solver."""
        return as_solver(self.solver)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return option name → default, without the inner solver."""
        return {name: value for name, value in super().option_defaults().items() if name != "solver"}

    def prepare(self) -> None:
        """Prepare the inner solver."""
        self.inner.prepare()

    def refuse(self, problem: Problem) -> str:
        """Say why the inner solver does not support ``problem``, or return an empty string."""
        return self.inner.refuse(problem)

    def require(self, problem: Problem) -> None:
        """Check that the inner solver can run on ``problem``."""
        self.inner.require(problem)

    def require_kind(self, *, pairs: bool, paired_budgets: Sequence[str] = ()) -> None:
        """Check that the inner solver can run on problems of a kind."""
        self.inner.require_kind(pairs=pairs, paired_budgets=paired_budgets)
