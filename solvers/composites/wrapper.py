"""What solvers that run other solvers share: a wrapper is a solver, and has the abilities of the one it holds.

    solve(problem, MultiStart("sa", starts=4))          compare(problem, [Polish("ga"), Recording("anneal", path)])

A wrapper's inner solver runs on an `inner_search`: it has an incumbent, a bound, details and random numbers of its own,
and everything it finds goes on to the outer search, which judges it again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from formulations import Problem
from formulations.reductions.base import Choice, Identity
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
    """The search of a solver inside another: a run of its own on the same problem, whose finds the outer one gets."""
    same = Identity(original=search.problem)
    return SubSearch(same, search, seconds=seconds, initial=initial, apart=True, seed=seed, solver=solver.name)


@dataclass(frozen=True)
class Wrapper(Solver):
    """A solver that runs another one.

    Attributes:
        solver: a name, a `Solver` class or instance, or a dimod sampler. It is no option but part of the name.
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
        """The solver inside."""
        return as_solver(self.solver)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Option name → default; the solver inside is no option."""
        return {name: value for name, value in super().option_defaults().items() if name != "solver"}

    def prepare(self) -> None:
        """Prepare the inner solver."""
        self.inner.prepare()

    def refuse(self, problem: Problem) -> str:
        """Say why the inner solver cannot take ``problem``, or an empty string."""
        return self.inner.refuse(problem)

    def require(self, problem: Problem) -> None:
        """Raise what keeps the solver inside from running."""
        self.inner.require(problem)
