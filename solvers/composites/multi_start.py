"""`MultiStart`: run a solver several times with independent seeds, and keep the best result."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search
from solvers.composites.wrapper import Wrapper, inner_search


@dataclass(frozen=True)
class MultiStart(Wrapper):
    """Run a solver ``starts`` times, until the first proof; a time limit is divided equally among the starts.

    ``details["starts"]`` has the result of each start, which shows the spread of a heuristic.

    Attributes:
        starts: number of runs.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(10, rank=2), MultiStart("anneal", starts=2), seed=0)
    >>> solution.solver, len(solution.details["starts"])
    ('multi-start(anneal)', 2)
    """

    name: ClassVar[str] = "multi-start"
    summary: ClassVar[str] = "a solver run several times with independent seeds, the best kept"
    minima: ClassVar[Mapping[str, int]] = {"starts": 1}
    starts: int = 4

    def run(self, problem: Problem, search: Search) -> None:
        """Run start after start, until one proves its answer, all are done, or the time is over."""
        seeds = search.rng.integers(2**31, size=self.starts).tolist()
        summaries = search.details["starts"] = []
        cut = False
        for number, seed in enumerate(seeds):
            if search.proven() or search.expired():
                return
            seconds = search.remaining() / (self.starts - number)
            solver = self.inner
            inner = inner_search(search, solver, seconds=seconds, seed=seed, initial=search.initial)
            solver.run(problem, inner)
            cut |= inner.cut
            summaries.append(inner.summary())
        if cut:
            search.cut_short()
