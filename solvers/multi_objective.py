"""The Pareto front of objective and a resource: NSGA-II (pymoo; Deb et al., doi:10.1109/4235.996017) with local search.

    pareto_front(problem, "bytes")  ──▶  points that no other choice found dominates

The first population consists of descents at the prices at which groups change their option. A child descends either in
the objective plus a price times the use, or in the objective alone without raising its use, so that points between the
corners of the convex hull are reached too. All evaluated choices compete for the front, not only the last population.
At the end all single switches of every point are tried. Points are sorted by use, none dominates another, and all are
feasible.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
from pymoo.core.problem import Problem as PymooProblem
from pymoo.core.repair import Repair

from formulations import Problem
from formulations.reductions.scaling import normal_form
from solvers.errors import InvalidOptionError
from solvers.heuristic.genetic_operators import set_up
from solvers.kernels.compiled import compiled
from solvers.kernels.local_search import descend_flat, polish_flat
from solvers.kernels.moves import (
    Arrays,
    Floats,
    Integers,
    begin,
    delta,
    fits,
    judge_all,
    objective,
    to_arrays,
)
from solvers.kernels.repair import repair_flat
from solvers.kernels.warm import warm
from solvers.validation import require_problem

TIE = 1e-12
"""Objectives that differ by less than this, relative to the front's range, count as equal."""

BATCH, TRIED = 256, 10_000
"""Maximum number of points whose single switches are evaluated at once, and in total."""

POLISHABLE = 2_000
"""Maximum number of options for which pairs of switches are tried too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """A choice (local option indices) with its objective and use of the resource from `Problem.evaluate`."""

    choice: tuple[int, ...]
    objective: float
    usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoFront:
    """A Pareto front, with points by rising use and falling objective.

    Attributes:
        resource: name of the resource that is the second objective.
        points: the points, none of which dominates another.
        generations: number of generations that were run.
        wall_s: wall time in seconds.
    """

    resource: str
    points: tuple[ParetoPoint, ...]
    generations: int
    wall_s: float

    def __iter__(self) -> Iterator[ParetoPoint]:
        """Iterate over the points by rising use."""
        return iter(self.points)

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def best_within(self, budget: float) -> ParetoPoint | None:
        """Return the point with the smallest objective that uses at most ``budget``, or None."""
        return next((point for point in reversed(self.points) if point.usage <= budget), None)


def pareto_front(
    problem: Problem,
    resource: str,
    *,
    population: int = 100,
    generations: int = 100,
    time_limit: float | None = None,
    seed: int | None = None,
    on_generation: Callable[[int, int], None] | None = None,
) -> ParetoFront:
    """Find choices that trade the objective against a resource, within all budgets (including one for ``resource``).

    Args:
        problem: the problem to solve.
        resource: name of one of its resources.
        population: size of the population; the front may have more or fewer points.
        generations: number of generations.
        time_limit: maximum time in seconds, after which the front found so far is returned.
        seed: random seed; the same seed gives the same front, unless the time limit ends the run.
        on_generation: function called with the number of the generation and the number of points on the front.

    Raises:
        InvalidOptionError: the resource is unknown, or a number is out of range.
        InfeasibleBudgetError: a budget lies below the smallest possible use.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {})
    >>> [(point.usage, point.objective) for point in pareto_front(problem, "bytes", seed=0, generations=5)]
    [(8.0, 4.0), (12.0, 1.0), (16.0, 0.0)]
    """
    require_problem(problem, "pareto_front")
    if resource not in problem.resources:
        known_resources = ", ".join(problem.resources) or "none"
        raise InvalidOptionError(f"the problem has no resource {resource!r}; it has: {known_resources}")
    if problem.resource_pairs:
        raise InvalidOptionError("pareto_front takes no resources with pair terms; use sweep with budgets as points")
    for option, value, least in (("population", population, 2), ("generations", generations, 1)):
        if value < least:
            raise InvalidOptionError(f"option {option!r} of a Pareto front must be at least {least}, found {value}")
    problem.require_reachable_budgets()
    warm()
    start = time.perf_counter()
    deadline = start + (np.inf if time_limit is None else time_limit)
    rng = np.random.default_rng(seed)
    space = _Space(normal_form(problem).problem, resource, rng)
    bred = 0
    first = space.first(population)
    if len(first):
        algorithm = set_up(NSGA2, space, first, rng, _Improved(), binary_tournament)
        while bred < generations and time.perf_counter() < deadline and algorithm.has_next():
            algorithm.next()
            bred += 1
            if on_generation is not None:
                on_generation(bred, len(space.chosen))
        space.finish(deadline, population)
    points = [_point(problem, resource, chosen - problem.group_offsets[:-1]) for chosen in space.chosen]
    return ParetoFront(
        resource=resource,
        points=tuple(point for point in points if point is not None),
        generations=bred,
        wall_s=time.perf_counter() - start,
    )


def _point(problem: Problem, resource: str, choice: Integers) -> ParetoPoint | None:
    judged = problem.evaluate(choice)
    if not judged.feasible:
        return None
    return ParetoPoint(choice=tuple(choice.tolist()), objective=judged.objective, usage=judged.usage[resource])


class _Space(PymooProblem):  # type: ignore[misc]
    """The two objectives for pymoo, and the front of all evaluated choices (flat options, by rising use)."""

    def __init__(self, problem: Problem, resource: str, rng: np.random.Generator) -> None:
        self.arrays, self.rng = to_arrays(problem), rng
        self.sizes = np.diff(problem.group_offsets)
        self.use = problem.resources[resource]
        self.slopes = self._slopes()
        self.chosen = np.zeros((0, problem.num_groups), dtype=np.int64)
        self._front = np.zeros((0, 2))
        super().__init__(n_var=len(self.sizes), n_obj=2, n_ieq_constr=1, xl=0, xu=self.sizes - 1, vtype=int)

    def _evaluate(self, choices: Integers, out: dict[str, Any], *_: Any, **__: Any) -> None:
        values, excess = self.judge(self.flat(choices))
        out["F"], out["G"] = values, excess[:, None]

    def flat(self, choices: Integers) -> Integers:
        """Convert local option indices ``(n, G)`` to flat ones."""
        return np.asarray(choices, dtype=np.int64) + self.arrays.starts[:-1]

    def judge(self, chosen: Integers) -> tuple[Floats, Floats]:
        """Return objective and use ``(n, 2)`` and the excess over the budgets; update the front."""
        objectives, excess = judge_all(self.arrays, chosen)
        values = np.stack([objectives, self.use[chosen].sum(axis=1)], axis=1)
        feasible = excess == 0
        every, candidates = (
            np.concatenate([self._front, values[feasible]]),
            np.concatenate([self.chosen, chosen[feasible]]),
        )
        order = np.lexsort((every[:, 0], every[:, 1]))
        least = np.minimum.accumulate(every[order, 0])
        better = every[order, 0] < np.concatenate([[np.inf], least[:-1] - TIE * (1.0 + np.abs(least[:-1]))])
        self._front, self.chosen = every[order[better]], candidates[order[better]]
        return values, excess

    def first(self, count: int) -> Integers:
        """Return descents at a range of prices and random choices; none if no choice can be repaired."""
        a = self.arrays
        probe = a.starts[:-1].copy()
        if not repair_flat(a, probe):
            return np.zeros((0, len(self.sizes)), dtype=np.int64)
        chosen = self.flat(self.rng.integers(0, self.sizes, size=(count, len(self.sizes))))
        prices = np.quantile(self.slopes, np.linspace(0.0, 1.0, count // 2)) * np.linspace(0.99, 1.01, count // 2)
        for choice, price in zip(chosen[: count // 2], prices, strict=True):
            choice[:] = np.lexsort((a.cost + price * self.use, a.group_of))[a.starts[:-1]]
            self._descend(choice, price)
        for choice in chosen[count // 2 :]:
            repair_flat(a, choice)
        self.judge(chosen)
        return chosen - a.starts[:-1]

    def improved(self, chosen: Integers) -> Integers:
        """Improve children: half of them descend at a random price, the others without raising their use."""
        for number, choice in enumerate(chosen):
            if number % 2:
                self._descend(choice, self.rng.choice(self.slopes) * self.rng.lognormal(0.0, 0.2))
            elif repair_flat(self.arrays, choice):
                descend_flat(self._within(self.use[choice].sum()), choice)
        return chosen

    def finish(self, deadline: float, count: int) -> None:
        """Try single switches of all points, pairs of switches of ``count`` points, and single switches again."""
        tried: set[bytes] = set()
        self._try_switches(deadline, tried)
        if len(self.arrays.cost) > POLISHABLE:
            return
        picked = np.unique(np.linspace(0, len(self.chosen) - 1, count).astype(np.int64))
        polished, uses = self.chosen[picked], np.append(self._front[1:, 1], np.inf)[picked]
        for choice, following in zip(polished, uses, strict=True):
            if time.perf_counter() >= deadline:
                return
            polish_flat(self._within(following), choice, 2)
        self.judge(polished)
        self._try_switches(deadline, tried)

    def _try_switches(self, deadline: float, tried: set[bytes]) -> None:
        """Try every single switch of every point until the front has no new points."""
        a = self.arrays
        while time.perf_counter() < deadline and len(tried) < TRIED:
            fresh = np.array([point.tobytes() not in tried for point in self.chosen])
            if not fresh.any():
                return
            points = self.chosen[fresh][:: 1 + fresh.sum() // BATCH]  # spread over the front, in case time runs out
            tried.update(point.tobytes() for point in points)
            value, use, within = _switched(a, self.use, points)
            rival = np.searchsorted(self._front[:, 1], use, side="right") - 1
            places, option = np.nonzero(within & ((rival < 0) | (value < self._front[rival, 0])))
            switched = points[places]
            switched[np.arange(len(places)), a.group_of[option]] = option
            self.judge(switched)

    def _descend(self, chosen: Integers, price: float) -> None:
        if repair_flat(self.arrays, chosen):
            descend_flat(self.arrays._replace(cost=self.arrays.cost + price * self.use), chosen)

    def _within(self, usage: float) -> Arrays:
        """Add a budget of ``usage`` for the resource to the problem."""
        a = self.arrays
        return a._replace(
            use=np.ascontiguousarray(np.column_stack([a.use, self.use])),
            limit=np.append(a.limit, usage * (1.0 + 1e-12)),
            unit=np.append(a.unit, np.ptp(self.use) or 1.0),
        )

    def _slopes(self) -> Floats:
        """Return the prices at which some group alone would change its option, ascending."""
        order = np.lexsort((self.arrays.cost, self.use, self.arrays.group_of))
        cost, use, same = self.arrays.cost[order], self.use[order], np.diff(self.arrays.group_of[order]) == 0
        falls, rises = -np.diff(cost)[same], np.diff(use)[same]
        slopes = np.sort(falls[(falls > 0) & (rises > 0)] / rises[(falls > 0) & (rises > 0)])
        return slopes if len(slopes) else np.ones(1)


@compiled
def _switched(a: Arrays, use: Floats, points: Integers) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return objective, use and feasibility ``(n, V)`` after each single switch of choices ``(n, G)``."""
    shape = (len(points), len(a.cost))
    objectives, uses, within = np.empty(shape), np.empty(shape), np.empty(shape, dtype=np.bool_)
    for i in range(len(points)):
        total, field, usage = begin(a, points[i])
        value, used = objective(a, points[i], field), use[points[i]].sum()
        for v in range(len(a.cost)):
            old = points[i, a.group_of[v]]
            objectives[i, v] = value + delta(a, total, field, old, v)
            uses[i, v] = used + use[v] - use[old]
            within[i, v] = fits(a, usage + a.use[v] - a.use[old])
    return objectives, uses, within


class _Improved(Repair):  # type: ignore[misc]
    def _do(self, problem: _Space, choices: Integers, **_: Any) -> Integers:
        return problem.improved(problem.flat(choices)) - problem.arrays.starts[:-1]
