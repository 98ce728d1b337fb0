"""Genetic algorithm (pymoo): a choice is a vector of option indices, whole populations are judged at once.

Children that break a budget are repaired, and every child goes down to where no single switch pays (a memetic
algorithm), so that selection compares what choices can become, not penalties and accidents. What always holds:
random numbers come from the run's own generator, so that a seed gives the same answer again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from formulations import Problem
from solvers.base import Search, Solver
from solvers.kernels.local_search import polish
from solvers.kernels.warm import warm

PATIENCE = 60
"""Generations without a better choice after which the search ends."""


@dataclass(frozen=True)
class Genetic(Solver):
    """Genetic algorithm with uniform crossover, mutation by random switches, repair, descent, and a final polish.

    Attributes:
        population: choices alive at a time.
        generations: maximum number of rounds of mating; the search ends earlier when they stop paying.

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
        """Compile the loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Mate, mutate, repair, select, until the generations or the time are over; polish the best."""
        from solvers.heuristic import genetic_operators as genetic  # imports pymoo

        space = genetic.ChoiceSpace(problem, search)
        first = space.first(self.population)
        if not len(first):
            return  # repair tries harder to get within the budgets than mating would
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
            search.note(objective_before_polish=search.objective)
            with search.phase("polish_s"):
                search.offer(polish(problem, search.choice, search.remaining()))
