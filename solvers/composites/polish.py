"""`Polish`: improve any solver's answer by annealing from a low temperature and a local search."""

from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search
from solvers.composites.wrapper import Wrapper, inner_search
from solvers.heuristic.anneal import Anneal
from solvers.kernels.local_search import polish
from solvers.kernels.warm import warm

SHARE = 0.7
"""Maximum fraction of the time limit for the inner solver."""

POLISHABLE = 2_000
"""Maximum number of options for which the local search finishes within about a second."""

COLD = Anneal(sweeps=1000, population=4, generations=10)
"""Annealing from a given choice, which starts at a low temperature to keep the good parts of the choice."""


@dataclass(frozen=True)
class Polish(Wrapper):
    """Run a solver, then improve its choice.

    ``details["steps"]`` has the objective after the solver itself, after the cold anneal and after the local search.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(20, seed=1), Polish("greedy"), seed=0)
    >>> [step["solver"] for step in solution.details["steps"]]
    ['greedy', 'anneal', 'polish']
    """

    name: ClassVar[str] = "polish"
    summary: ClassVar[str] = "a solver's choice improved by a cold anneal and a local search"

    def prepare(self) -> None:
        """Compile the inner loops."""
        super().prepare()
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Run the inner solver, then anneal from its choice at a low temperature, then descend."""
        seeds = search.rng.integers(2**31, size=2).tolist()
        steps = search.details["steps"] = []
        start, cut = search.initial, False
        for solver, seed, share in ((self.inner, seeds[0], SHARE), (COLD, seeds[1], 1.0)):
            inner = inner_search(search, solver, seconds=share * search.remaining(), seed=seed, initial=start)
            solver.run(problem, inner)
            cut |= inner.cut
            steps.append(inner.summary())
            start = search.choice
            if start is None or search.proven() or search.expired():
                break
        if start is not None and problem.num_options <= POLISHABLE and not (search.proven() or search.expired()):
            begun, polished = search.elapsed(), polish(problem, start, search.remaining())
            search.offer(polished)
            last = {"solver": "polish", "objective": search.as_stated(problem.evaluate(polished).objective)}
            steps.append(last | {"wall_s": search.elapsed() - begun})
        if cut:
            search.cut_short()
