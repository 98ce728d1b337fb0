"""What the genetic algorithm is made of: the choice space as pymoo's problem, its crossover, mutation and repair."""

from typing import Any

import numpy as np
from pymoo.algorithms.soo.nonconvex.ga import GA, comp_by_cv_and_fitness
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DefaultDuplicateElimination
from pymoo.core.mating import Mating
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.selection.tournament import TournamentSelection

from formulations import Problem
from solvers.base import Search
from solvers.kernels.local_search import descend_flat
from solvers.kernels.moves import Integers, judge_all, to_arrays
from solvers.kernels.repair import repair_flat

MATINGS = 3
"""Attempts to breed enough distinct children; in a small space there are no more to be had."""


class ChoiceSpace(PymooProblem):  # type: ignore[misc]
    """The problem as pymoo wants it: whole numbers below the sizes of the groups, one constraint (no excess)."""

    def __init__(self, problem: Problem, search: Search) -> None:
        self.problem, self.search, self.arrays = problem, search, to_arrays(problem)
        self.sizes = np.diff(problem.group_offsets)
        self.best_value = np.inf
        self.best: Integers | None = None
        super().__init__(n_var=len(self.sizes), n_obj=1, n_ieq_constr=1, xl=0, xu=self.sizes - 1, vtype=int)

    def _evaluate(self, choices: Integers, out: dict[str, Any], *_: Any, **__: Any) -> None:
        values, excess = judge_all(self.arrays, self.flat(choices))
        out["F"], out["G"] = values[:, None], excess[:, None]
        feasible = np.where(excess == 0, values, np.inf)
        best_row = int(np.argmin(feasible))
        if feasible[best_row] < self.best_value:
            self.best, self.best_value = choices[best_row].copy(), feasible[best_row]

    def offer_best(self) -> bool:
        """Hand the best feasible choice so far to the search; whether it was better than what that knew."""
        return self.best is not None and self.search.offer(self.best)

    def flat(self, choices: Integers) -> Integers:
        """Local option indices ``(n, G)`` as flat ones."""
        return np.asarray(choices, dtype=np.int64) + self.problem.group_offsets[:-1]

    def first(self, count: int) -> Integers:
        """Random choices and the caller's, improved; none when not even one of them can be."""
        choices = self.search.rng.integers(0, self.sizes, size=(count, len(self.sizes)))
        if self.search.initial is not None:
            choices[0] = self.search.initial
        else:  # the cheapest options: should there be time for one only, it is no random one
            cheapest = np.lexsort((self.problem.cost, self.problem.group_of))[self.problem.group_offsets[:-1]]
            choices[0] = cheapest - self.problem.group_offsets[:-1]
        chosen = self.flat(choices)
        if not repair_flat(self.arrays, chosen[0]):
            return choices[:0]
        return self.improved(chosen) - self.problem.group_offsets[:-1]

    def improved(self, chosen: Integers) -> Integers:
        """Flat choices ``(n, G)``, repaired where that is possible, and those taken to where no single switch pays.

        Once time is up the rest stays as it is.
        """
        for row in chosen:
            attempt = row.copy()
            if repair_flat(self.arrays, attempt):
                descend_flat(self.arrays, attempt)
                row[:] = attempt
            if self.search.expired():
                break
        return chosen


class _Improved(Repair):  # type: ignore[misc]
    def _do(self, problem: ChoiceSpace, choices: Integers, **_: Any) -> Integers:
        return problem.improved(problem.flat(choices)) - problem.problem.group_offsets[:-1]


class Uniform(Crossover):  # type: ignore[misc]
    """Each group's option from either parent; the two children complement each other."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(2, 2)
        self.rng = rng

    def _do(self, _: Any, parents: Integers, **__: Any) -> Integers:
        swap = self.rng.random(parents.shape[1:]) < 0.5
        return np.stack([np.where(swap, parents[1], parents[0]), np.where(swap, parents[0], parents[1])])


class Switch(Mutation):  # type: ignore[misc]
    """A few groups of every child, one on average, take a random option."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.rng = rng

    def _do(self, problem: ChoiceSpace, choices: Integers, **_: Any) -> Integers:
        drawn = self.rng.integers(0, problem.sizes, size=choices.shape)
        return np.where(self.rng.random(choices.shape) < 1.0 / len(problem.sizes), drawn, choices)


def algorithm(space: ChoiceSpace, first: Integers, rng: np.random.Generator) -> Any:
    """Pymoo's GA on ``space``, set up, beginning with the choices ``first`` ``(n, G)``."""
    return set_up(GA, space, first, rng, _Improved(), comp_by_cv_and_fitness)


def set_up(
    kind: Any, space: PymooProblem, first: Integers, rng: np.random.Generator, repair: Repair, better: Any
) -> Any:
    """Pymoo's algorithm ``kind``, set up, beginning with ``first``; ``better`` compares two choices."""
    distinct = DefaultDuplicateElimination()
    mating = Mating(
        TournamentSelection(func_comp=better),
        Uniform(rng),
        Switch(rng),
        repair=repair,
        eliminate_duplicates=distinct,
        n_max_iterations=MATINGS,
    )
    made = kind(
        pop_size=len(first),
        sampling=Population.new("X", first),
        mating=mating,
        repair=repair,
        eliminate_duplicates=distinct,
    )
    made.setup(space, termination=NoTermination(), seed=int(rng.integers(2**31)), verbose=False)
    return made
