"""Genetic algorithm (pymoo): a choice is a vector of option indices, and whole populations are evaluated at once.

Children that exceed a budget are repaired, and every child descends until no single switch improves it (a memetic
algorithm). Selection therefore compares local optima, without penalties. Random numbers come from the generator of the
run, so that the same seed gives the same result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search, Solver
from solvers.kernels.local_search import polish
from solvers.kernels.warm import warm

PATIENCE = 60
"""Number of generations without a better choice after which the search ends."""


@dataclass(frozen=True)
class Genetic(Solver):
    """Genetic algorithm with uniform crossover, mutation by random switches, repair, descent, and a final polish.

    Attributes:
        population: size of the population.
        generations: maximum number of generations; the search ends earlier if they bring no improvement.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(10), "ga", seed=0, generations=20).feasible
    True
    """

    name: ClassVar[str] = "ga"
    summary: ClassVar[str] = "genetic algorithm (pymoo) with repair and descent, polished at the end"
    requires: ClassVar[tuple[str, ...]] = ("pymoo",)
    minima: ClassVar[Mapping[str, int]] = {"population": 2, "generations": 1}
    population: int = 100
    generations: int = 300

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Mate, mutate, repair and select until the generations or the time are over, then polish the best choice."""
        from solvers.heuristic import genetic_operators as genetic  # imports pymoo

        space = genetic.ChoiceSpace(problem, search)
        first = space.first(self.population)
        if not len(first):
            return  # repair failed, and mating is less likely to find a feasible choice
        search.offer(first[0])
        algorithm = genetic.algorithm(space, first, search.rng)
        idle = 0
        with search.phase("solve_s"):
            for generation in range(self.generations):
                if idle == PATIENCE or search.expired() or not algorithm.has_next():
                    break
                algorithm.next()
                idle = 0 if space.offer_best() else idle + 1
                search.details["generations"] = generation + 1
        if search.choice is not None:
            search.details["objective_before_polish"] = search.as_stated(search.objective)
            with search.phase("polish_s"):
                search.offer(polish(problem, search.choice, search.remaining()))
