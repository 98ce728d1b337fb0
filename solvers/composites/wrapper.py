"""What solvers that run other solvers share: a wrapper is a solver, and has the abilities of the one it holds.

    solve(problem, MultiStart("sa", starts=4))          compare(problem, [Polish("ga"), Recording("anneal", path)])

A wrapper's inner solver runs on an `InnerSearch`: it has an incumbent, a bound, details and random numbers of its own,
and everything it finds goes on to the outer search, which judges it again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from solvers.base import Search, Solver
from solvers.run import as_solver

INHERITED = ("native_constraints", "native_pairs", "needs_network", "deterministic", "honours_time_limit", "exact")


class InnerSearch(Search):
    """The search of a solver inside another; it ends with the outer one or when ``time_limit`` seconds are over."""

    def __init__(
        self,
        problem: Problem,
        outer: Search,
        *,
        solver: str,
        time_limit: float = float("inf"),
        seed: int | None = None,
        initial: NDArray[np.int64] | None = None,
    ) -> None:
        seconds = min(outer.remaining(), time_limit)
        limit = None if np.isinf(seconds) else max(seconds, 1e-9)
        super().__init__(problem, solver=solver, time_limit=limit, seed=seed, initial=initial)
        self.outer = outer

    @property
    def original(self) -> Problem:
        """The problem as it was stated to the outer search."""
        return self.outer.original

    def unscaled(self, number: float) -> float:
        """A scaled objective or price in the problem's own unit."""
        return self.outer.unscaled(number)

    def expired(self) -> bool:
        """Whether the time of this search, or of the outer one, is over."""
        return self.outer.expired() or super().expired()

    def proven(self) -> bool:
        """Whether nothing is left to do, here or outside."""
        return super().proven() or self.outer.proven()

    def offer(self, choice: ArrayLike) -> bool:
        """Judge a choice, keep it when better than this search's own, and hand it on."""
        if kept := super().offer(choice):
            self.outer.offer(choice)
        return kept

    def raise_bound(self, bound: float) -> None:
        """Keep a proven bound and hand it on."""
        super().raise_bound(bound)
        self.outer.raise_bound(bound)

    def recover(self, error: Exception) -> None:
        """Keep what is known after an error; the outer search ends with it as well."""
        super().recover(error)
        self.outer.recover(error)

    def close(self) -> None:
        """Every feasible choice was considered, and the outer search knows the best of them."""
        super().close()
        self.outer.close()

    def summary(self) -> dict[str, Any]:
        """What was found here, in the problem's own unit, for the outer search's details."""
        values = {"objective": self.objective, "bound": self.bound}
        own = {name: None if value is None else self.unscaled(value) for name, value in values.items()}
        return {"solver": self._solver, "seed": self.seed, **own, "wall_s": self.elapsed(), "details": self.details}


@dataclass(frozen=True)
class Wrapper(Solver):
    """A solver that runs another one.

    Attributes:
        solver: a name, a `Solver` class or instance, or a dimod sampler. It is no option but part of the name.
    """

    name: ClassVar[str] = "wrapper"
    summary: ClassVar[str] = "runs another solver"
    solver: Any = "auto"

    def __post_init__(self) -> None:
        inner = self.inner
        object.__setattr__(self, "name", f"{type(self).name}({inner.label})")
        for attribute in INHERITED:
            object.__setattr__(self, attribute, getattr(inner, attribute))
        object.__setattr__(self, "presolved", type(self).presolved and inner.presolved)

    @property
    def inner(self) -> Solver:
        """The solver inside."""
        return as_solver(self.solver)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Option name → default; the solver inside is no option."""
        return {name: value for name, value in super().option_defaults().items() if name != "solver"}

    def prepare(self) -> None:
        """Whatever the solver inside needs."""
        self.inner.prepare()

    def refuse(self, problem: Problem) -> str:
        """What the solver inside says."""
        return self.inner.refuse(problem)

    def require(self, problem: Problem) -> None:
        """Raise what keeps the solver inside from running."""
        self.inner.require(problem)
