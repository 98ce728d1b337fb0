"""The Pareto curve of a budget: the least objective for every amount of a resource, each point with bound and price.

A choice within a budget is within every looser one, and a bound for a budget holds for every tighter one. So the
sweep goes from tight to loose and starts each point from the one before, and in the end every point takes the best
choice that fits it and the best bound that holds for it. What always holds: the objective never rises and the bound
never rises as the budget grows; both hold at the budget that is named, as `Problem.evaluate` judges it.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath, write_json
from formulations.formatting import number, percent
from formulations.reductions.scaling import scaled
from solvers import registry
from solvers.base import Solver, SolverLike
from solvers.errors import InvalidOptionError
from solvers.journal import Journal, run_key
from solvers.known import with_known
from solvers.run import as_solver, solve
from solvers.solution import Solution, StopReason

FILE_KIND = FileKind("qcompress sweep", version=1)

BOUND_SHARE = 0.2
"""Largest share of a point's time that goes into its bound and price."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepPoint:
    """The answer at one budget.

    Attributes:
        budget: the most of the resource that may be used.
        price: shadow price, the budget's Lagrange multiplier (≥ 0): by how much the dual bound falls per unit of
            resource that is added, hence about what a little more of it buys. At the smallest possible use, where
            any larger one would do as well, that of the next larger use.
        solution: choice, objective, bound, gap, status and usage at this budget.
    """

    budget: float
    price: float
    solution: Solution

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        return {"budget": self.budget, "price": self.price, "solution": self.solution.to_json()}

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "SweepPoint":
        """The point that `to_json` made a dictionary of; ``where`` names its origin in errors.

        Raises:
            FileFormatError: it is no such dictionary.
        """
        with FILE_KIND.building(where):
            budget, price = float(json["budget"]), float(json["price"])
            return cls(budget=budget, price=price, solution=Solution.from_json(json["solution"], where))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Band:
    """Between which values the least objective lies for every budget: corners ``(T,)`` of two falling stairs."""

    budget: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """The points of a sweep, from the tightest budget to the loosest.

    Attributes:
        problem_fingerprint: of the problem with the budget it came with.
        time_limit: seconds for every point.
    """

    resource: str
    problem_fingerprint: str
    solver: str
    time_limit: float | None
    seed: int | None
    points: tuple[SweepPoint, ...]

    def band(self) -> Band:
        """What is proven for the budgets between the points, too: at most the last point's objective, at least the
        next one's bound. Without a choice or a bound there it is infinite.
        """
        budget = np.repeat([point.budget for point in self.points], 2)[1:-1]
        upper = [_or(point.solution.objective, np.inf) for point in self.points[:-1]]
        lower = [_or(point.solution.bound, -np.inf) for point in self.points[1:]]
        return Band(budget=budget, lower=np.repeat(lower, 2), upper=np.repeat(upper, 2))

    def to_markdown(self) -> str:
        """The curve as a Markdown table."""
        lines = [
            f"| {self.resource} at most | used | objective | bound | gap | status | price per unit | price per 1 % |",
            "|--:|--:|--:|--:|--:|---|--:|--:|",
        ]
        for point in self.points:
            solution = point.solution
            used = "–" if solution.choice is None else f"{solution.usage[self.resource]:,.10g}"
            results = [used, number(solution.objective), number(solution.bound), percent(solution.gap)]
            prices = [f"{point.price:.3g}", f"{0.01 * point.budget * point.price:.3g}"]
            cells = [f"{point.budget:,.10g}", *results, str(solution.status), *prices]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        header = {**FILE_KIND.header, "problem_fingerprint": self.problem_fingerprint}
        settings = {
            "resource": self.resource, "solver": self.solver, "time_limit": self.time_limit, "seed": self.seed,
        }  # fmt: skip
        return {**header, **settings, "points": [point.to_json() for point in self.points]}

    def save(self, path: AnyPath) -> None:
        """Write the sweep as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Sweep":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON, or of a newer version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            value["points"] = tuple(SweepPoint.from_json(point, str(path)) for point in value["points"])
            return cls(**value)


def sweep(
    problem: Problem,
    resource: str,
    points: int | Iterable[float] = 10,
    *,
    solver: SolverLike = "auto",
    time_limit: float | None = None,
    seed: int | None = None,
    journal: AnyPath | None = None,
    on_point: Callable[[SweepPoint], None] | None = None,
    **options: Any,
) -> Sweep:
    """Solve a problem at several budgets of one resource, from tight to loose.

    Args:
        problem: what to solve; its other budgets stay.
        resource: whose budget is changed (it need not have one).
        points: the budgets, or how many: then from the smallest possible use to the largest, evenly spaced in the
            logarithm (evenly spaced when the smallest use is 0), whole numbers where the uses are.
        solver: as `solve` takes it.
        time_limit: seconds for every point.
        seed: same seed, same answer (where no time limit cut a point).
        journal: a file that every point is written to as it is solved; points that are in it are taken from there.
        on_point: called after every point that was solved.
        **options: the solver's own.

    Returns:
        The curve. Ctrl-C ends it with the points so far.

    Raises:
        InvalidOptionError: no such resource, or points that are no budgets.
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.
        FileFormatError: ``journal`` is no journal.

    >>> from formulations.generators.random_instances import layered_problem
    >>> curve = sweep(layered_problem(4, bits=(2, 4, 8)), "bytes", 5)
    >>> [round(point.solution.objective, 4) for point in curve.points]
    [1.6211, 0.9745, 0.247, 0.0676, 0.0007]
    >>> [point.price > 0 for point in curve.points]
    [True, True, True, True, False]
    """
    back_end = registry.configured(as_solver(solver), options)
    problems = {budget: problem.with_budgets(**{resource: budget}) for budget in _budgets(problem, resource, points)}
    for at_budget in problems.values():
        at_budget.require_reachable_budgets()
        back_end.require(at_budget)
    notes = None if journal is None else Journal(journal)
    solved_points: list[SweepPoint] = []
    last = None
    for at_budget in problems.values():
        key = run_key("sweep", at_budget, back_end, time_limit, seed)
        value = None if notes is None else notes.get(key)
        if value is None:
            try:
                point = _solved(at_budget, resource, back_end, time_limit, seed, last)
            except KeyboardInterrupt:  # before the solver ran, which ends with what it has
                break
            if notes is not None and point.solution.stop_reason is not StopReason.INTERRUPTED:
                notes.add(key, point.to_json())
            if on_point is not None:
                on_point(point)
        else:
            point = SweepPoint.from_json(value, "the journal")
        solved_points.append(point)
        last = last if point.solution.choice is None else point.solution.choice
        if point.solution.stop_reason is StopReason.INTERRUPTED:
            break
    return Sweep(
        resource=resource,
        problem_fingerprint=problem.fingerprint(),
        solver=back_end.name,
        time_limit=time_limit,
        seed=seed,
        points=_shared(problem, resource, solved_points),
    )


def _budgets(problem: Problem, resource: str, points: int | Iterable[float]) -> list[float]:
    """The budgets, ascending and each once."""
    if resource not in problem.resources:
        resources = ", ".join(problem.resources) or "none"
        raise InvalidOptionError(f"the problem has no resource {resource!r}; it has: {resources}")
    if not isinstance(points, int | np.integer):
        budgets = sorted({float(budget) for budget in points})
        if not budgets or not np.isfinite(budgets).all():
            raise InvalidOptionError(f"points must be a number of points or a list of budgets, found {budgets}")
        return budgets
    if points < 2:
        raise InvalidOptionError(f"a curve has at least 2 points, found {points}")
    if resource in problem.resource_pairs:
        raise InvalidOptionError(f"{resource!r} has pair terms, so its range is not known: give the budgets as points")
    use, starts = problem.resources[resource], problem.group_offsets[:-1]
    fixed = problem.fixed.get(resource, 0.0)
    smallest, largest = (fixed + float(extreme.reduceat(use, starts).sum()) for extreme in (np.minimum, np.maximum))
    spaced = np.geomspace(smallest, largest, points) if smallest > 0 else np.linspace(smallest, largest, points)
    if (use == np.floor(use)).all() and fixed == np.floor(fixed):
        spaced = np.floor(spaced)
    return [float(budget) for budget in np.unique([smallest, *spaced[1:-1], largest])]


def _solved(
    problem: Problem,
    resource: str,
    solver: Solver,
    time_limit: float | None,
    seed: int | None,
    start: NDArray[np.int64] | None,
) -> SweepPoint:
    """A point by itself: bound and price from the dual, the choice from the solver."""
    from solvers.bounds.duality import dual_bound  # compiled code, imported only when it is used

    begin = time.perf_counter()
    reduction, budget = scaled(problem), problem.budgets[resource]
    seconds = float("inf") if time_limit is None else BOUND_SHARE * time_limit
    dual = priced = dual_bound(reduction.problem, time_limit=seconds)
    if budget < (first := _first_step(problem, resource)):  # only the least use fits: any price above some would do
        priced = dual_bound(reduction.problem.with_budgets(**{resource: first}), time_limit=seconds)
    spent = time.perf_counter() - begin
    rest = None if time_limit is None else time_limit - min(spent, BOUND_SHARE * time_limit)
    solution = solve(problem, solver, time_limit=rest, seed=seed, initial=start)
    solution = with_known(problem, solution, bounds=[reduction.lift_bound(dual.value)])
    return SweepPoint(budget=budget, price=priced.prices[resource] * reduction.unit, solution=solution)


def _first_step(problem: Problem, resource: str) -> float:
    """The least use of a resource above the smallest possible one; the smallest itself where there is no other."""
    use, starts = problem.resources[resource], problem.group_offsets[:-1]
    least, smallest = np.minimum.reduceat(use, starts), problem.minimum_usage()[resource]
    above = use - least[problem.group_of]
    return float(smallest + above[above > 0].min()) if above.any() else smallest


def _shared(problem: Problem, resource: str, points: list[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Every point with the best choice of all that fits its budget, and the best bound of all that holds for it."""
    shared: list[SweepPoint] = []
    bound = None
    for point in reversed(points):
        at_budget = problem.with_budgets(**{resource: point.budget})
        choices = [other.solution.choice for other in points if other.solution.choice is not None]
        solution = with_known(at_budget, point.solution, choices=choices, bounds=[bound])
        bound = solution.bound
        shared.append(replace(point, solution=solution))
    return tuple(reversed(shared))


def _or(value: float | None, missing: float) -> float:
    return missing if value is None else value
