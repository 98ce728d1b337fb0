"""Parts of the genetic algorithm: the space of choices as pymoo's problem, crossover, mutation and repair."""

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
from solvers.search import cheapest

MATINGS = 3
"""Number of attempts to make enough distinct children; a small space may not have more."""


class ChoiceSpace(PymooProblem):  # type: ignore[misc]
    """The problem in pymoo's form: whole numbers below the sizes of the groups, with one constraint (no excess)."""

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
        """Report the best feasible choice so far to the search; return whether it was better than the incumbent."""
        return self.best is not None and self.search.offer(self.best)

    def flat(self, choices: Integers) -> Integers:
        """Convert local option indices ``(n, G)`` to flat ones."""
        return np.asarray(choices, dtype=np.int64) + self.problem.group_offsets[:-1]

    def first(self, count: int) -> Integers:
        """Return improved random choices and the caller's choice; none if no choice can be repaired."""
        choices = self.search.rng.integers(0, self.sizes, size=(count, len(self.sizes)))
        if self.search.initial is not None:
            choices[0] = self.search.initial
        else:  # the cheapest options come first, in case there is time for only one choice
            choices[0] = cheapest(self.problem)
        chosen = self.flat(choices)
        if not repair_flat(self.arrays, chosen[0], self.search.expired):
            return choices[:0]
        return self.improved(chosen) - self.problem.group_offsets[:-1]

    def improved(self, chosen: Integers) -> Integers:
        """Repair flat choices ``(n, G)`` if possible, and improve them until no single switch helps.

        When the time is over, the remaining choices are returned unchanged.
        """
        for row in chosen:
            attempt = row.copy()
            if repair_flat(self.arrays, attempt, self.search.expired):
                descend_flat(self.arrays, attempt)
                row[:] = attempt
            if self.search.expired():
                break
        return chosen


class _Improved(Repair):  # type: ignore[misc]
    def _do(self, problem: ChoiceSpace, choices: Integers, **_: Any) -> Integers:
        return problem.improved(problem.flat(choices)) - problem.problem.group_offsets[:-1]


class Uniform(Crossover):  # type: ignore[misc]
    """Uniform crossover: each group takes the option of either parent, and the two children are complementary."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(2, 2)
        self.rng = rng

    def _do(self, _: Any, parents: Integers, **__: Any) -> Integers:
        swap = self.rng.random(parents.shape[1:]) < 0.5
        return np.stack([np.where(swap, parents[1], parents[0]), np.where(swap, parents[0], parents[1])])


class Switch(Mutation):  # type: ignore[misc]
    """Mutation: a few groups of every child, one on average, take a random option."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.rng = rng

    def _do(self, problem: ChoiceSpace, choices: Integers, **_: Any) -> Integers:
        drawn = self.rng.integers(0, problem.sizes, size=choices.shape)
        return np.where(self.rng.random(choices.shape) < 1.0 / len(problem.sizes), drawn, choices)


def algorithm(space: ChoiceSpace, first: Integers, rng: np.random.Generator) -> Any:
    """Set up pymoo's GA on ``space``, starting with the choices ``first`` ``(n, G)``."""
    return set_up(GA, space, first, rng, _Improved(), comp_by_cv_and_fitness)


def set_up(
    kind: Any, space: PymooProblem, first: Integers, rng: np.random.Generator, repair: Repair, better: Any
) -> Any:
    """Set up pymoo's algorithm ``kind``, starting with ``first``; ``better`` compares two choices."""
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
