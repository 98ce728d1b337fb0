"""Sweep a budget: minimise the objective at several amounts of a resource, with a bound and a price for each point.

A choice within a budget is also within every looser budget, and a bound for a budget also holds for every tighter one.
The sweep therefore goes from tight to loose budgets and starts each point from the previous one. At the end every point
takes the best choice within its budget and the best bound that holds for it. As the budget grows, neither the objective
nor the bound ever rises. Both hold for the point's budget as `Problem.evaluate` computes them. On request, the choices
are nested in each other (`solvers.nested_sweep`).
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
from formulations.formatting import markdown_table, number, percent
from formulations.reductions.scaling import scaled
from solvers import registry
from solvers.base import Solver, SolverLike
from solvers.errors import InvalidOptionError
from solvers.journal import Journal, run_key
from solvers.nested_sweep import Point
from solvers.nested_sweep import nested as nested_solutions
from solvers.run import as_solver, solve
from solvers.solution import Solution, StopReason
from solvers.solution_update import with_known
from solvers.stated_search import StatedSearch
from solvers.validation import require_problem

FILE_KIND = FileKind("qcompress sweep", version=3)

BOUND_SHARE = 0.2
"""Maximum fraction of a point's time that is spent on its bound and price."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SweepPoint:
    """The result at one budget.

    Attributes:
        budget: upper limit on the use of the resource.
        price: shadow price, i.e. the budget's Lagrange multiplier (≥ 0): the decrease of the dual bound per additional
            unit of the resource, and thus about the gain from a slightly larger budget. If the budget admits only the
            smallest possible use, the price is not unique, and the one of the next larger use is given.
        solution: choice, objective, bound, gap, status and usage at this budget.
    """

    budget: float
    price: float
    solution: Solution

    def to_json(self) -> dict[str, Any]:
        """Return the point as a dictionary that JSON can store."""
        return {"budget": self.budget, "price": self.price, "solution": self.solution.to_json()}

    @classmethod
    def from_json(cls, json: dict[str, Any], where: str) -> "SweepPoint":
        """Restore a point from the dictionary that `to_json` returned; ``where`` names its origin in errors.

        Raises:
            FileFormatError: the dictionary is not a point.
        """
        with FILE_KIND.building(where):
            budget, price = float(json["budget"]), float(json["price"])
            return cls(budget=budget, price=price, solution=Solution.from_json(json["solution"], where))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Band:
    """Bounds on the minimum objective for every budget, as corners ``(T,)`` of two falling step functions."""

    budget: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sweep:
    """The result of a sweep.

    Attributes:
        resource: name of the resource whose budget varies.
        problem_fingerprint: fingerprint of the problem with its original budgets.
        solver, seed: the solver's name and random seed.
        time_limit: maximum time in seconds for each point.
        points: the points, from the tightest budget to the loosest.
        nested: whether no group uses more of the resource at a tighter budget than at a looser one.
        stop_reason: INTERRUPTED if Ctrl-C ended the sweep: points are missing, or choices are nested without a solver.
    """

    resource: str
    problem_fingerprint: str
    solver: str
    time_limit: float | None
    seed: int | None
    points: tuple[SweepPoint, ...]
    nested: bool = False
    stop_reason: StopReason = StopReason.COMPLETED

    def band(self) -> Band:
        """Return proven bounds for all budgets, including those between the points.

        The upper bound is the objective of the previous point, the lower bound is the bound of the next point. They are
        infinite where a point has no choice or no bound.
        """
        budget = np.repeat([point.budget for point in self.points], 2)[1:-1]
        upper = [_or(point.solution.objective, np.inf) for point in self.points[:-1]]
        lower = [_or(point.solution.bound, -np.inf) for point in self.points[1:]]
        return Band(budget=budget, lower=np.repeat(lower, 2), upper=np.repeat(upper, 2))

    def _repr_markdown_(self) -> str:
        """Show the tables in a notebook."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Format the curve as a Markdown table."""
        columns = (
            f">{self.resource} at most", ">used", ">objective", ">bound", ">gap", "status", ">price per unit",
            ">price per 1 %",
        )  # fmt: skip
        rows = []
        for point in self.points:
            solution = point.solution
            used = "–" if solution.choice is None else f"{solution.usage[self.resource]:,.10g}"
            results = [used, number(solution.objective), number(solution.bound), percent(solution.gap)]
            prices = [f"{point.price:.3g}", f"{0.01 * point.budget * point.price:.3g}"]
            rows.append([f"{point.budget:,.10g}", *results, str(solution.status), *prices])
        return markdown_table(columns, rows) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the sweep as a dictionary that JSON can store."""
        header = {**FILE_KIND.header, "problem_fingerprint": self.problem_fingerprint}
        settings = {
            "resource": self.resource, "solver": self.solver, "time_limit": self.time_limit, "seed": self.seed,
            "nested": self.nested, "stop_reason": str(self.stop_reason),
        }  # fmt: skip
        return {**header, **settings, "points": [point.to_json() for point in self.points]}

    def save(self, path: AnyPath) -> None:
        """Write the sweep as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Sweep":
        """Read a sweep that `save` wrote.

        Raises:
            FileFormatError: the file is not a sweep, or has another version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            value["stop_reason"] = StopReason(value["stop_reason"])
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
    nested: bool = False,
    journal: AnyPath | None = None,
    on_point: Callable[[SweepPoint], None] | None = None,
    **options: Any,
) -> Sweep:
    """Solve a problem at several budgets of one resource, from tight to loose.

    Args:
        problem: the problem to solve; its other budgets stay.
        resource: name of the resource whose budget varies (the problem need not have a budget for it).
        points: the budgets, or their number. A number of budgets is spaced evenly in the logarithm from the smallest
            possible use to the largest (linearly if the smallest use is 0), rounded if all uses are whole numbers. With
            pair terms in the resource the ends are the uses of a small and of a large choice.
        solver: the solver, same as in `solve`.
        time_limit: maximum time in seconds for each point.
        seed: random seed; the same seed gives the same result, unless the time limit ends a point.
        nested: whether no group may use more of the resource at a tighter budget than at a looser one, so that one file
            serves all models; takes up to two further runs a point (see `solvers.nested_sweep`).
        journal: path of a file to which every solved point is written; points already in it are not solved again.
        on_point: function called after every solved point.
        **options: options of the solver.

    Returns:
        The curve. Ctrl-C ends the sweep with the points so far; those of a nested sweep are nested without a solver.

    Raises:
        InvalidOptionError: the resource is unknown, or the points are not budgets.
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.
        FileFormatError: ``journal`` is not a journal file.

    >>> from formulations.generators.random_instances import layered_problem
    >>> curve = sweep(layered_problem(4, bits=(2, 4, 8)), "bytes", 5)
    >>> [round(point.solution.objective, 4) for point in curve.points]
    [1.6211, 0.9745, 0.247, 0.0676, 0.0007]
    >>> [point.price > 0 for point in curve.points]
    [True, True, True, True, False]
    """
    require_problem(problem, "sweep")
    seed = seed.item() if isinstance(seed, np.integer) else seed  # which JSON can store
    back_end = registry.configured(as_solver(solver), options)
    if nested and resource in problem.resource_pairs:
        raise InvalidOptionError(f"{resource!r} has pair terms, so no part has a use of its own that could be nested")
    problems = {budget: problem.with_budgets(**{resource: budget}) for budget in _budgets(problem, resource, points)}
    for at_budget in problems.values():
        at_budget.require_reachable_budgets()
        back_end.require(at_budget)
    notes = None if journal is None else Journal(journal)
    solved_points: list[SweepPoint] = []
    last, stop_reason = None, StopReason.COMPLETED
    for at_budget in problems.values():
        key = run_key("sweep", at_budget, back_end, time_limit, seed)
        value = None if notes is None else notes.get(key)
        if value is None:
            try:
                point = _solved(at_budget, resource, back_end, time_limit, seed, last)
            except KeyboardInterrupt:  # outside the solver, which handles it by itself
                stop_reason = StopReason.INTERRUPTED
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
            stop_reason = StopReason.INTERRUPTED
            break
    shared = _shared(problem, resource, solved_points)
    if nested:
        shared, stop_reason = _nested(problem, resource, shared, back_end, time_limit, seed, notes, stop_reason)
    return Sweep(
        resource=resource,
        problem_fingerprint=problem.fingerprint(),
        solver=back_end.name,
        time_limit=time_limit,
        seed=seed,
        points=shared,
        nested=nested,
        stop_reason=stop_reason,
    )


def _budgets(problem: Problem, resource: str, points: int | Iterable[float]) -> list[float]:
    """Return the distinct budgets, ascending."""
    if resource not in problem.resources:
        resources = ", ".join(problem.resources) or "none"
        raise InvalidOptionError(f"the problem has no resource {resource!r}; it has: {resources}")
    if not isinstance(points, int | np.integer):
        budgets = sorted({float(budget) for budget in points})
        if not budgets or not np.isfinite(budgets).all():
            raise InvalidOptionError(f"points must be a number of points or a list of budgets, found {budgets}")
        return budgets
    if points < 2:
        raise InvalidOptionError(f"a curve needs at least 2 points, found {points}")
    smallest, largest, whole = _range(problem, resource)
    spaced = np.geomspace(smallest, largest, points) if smallest > 0 else np.linspace(smallest, largest, points)
    spaced = np.floor(spaced) if whole else spaced
    return [float(budget) for budget in np.unique([smallest, *spaced[1:-1], largest])]


def _range(problem: Problem, resource: str) -> tuple[float, float, bool]:
    """Return the smallest and the largest use of a resource, and whether all uses are whole numbers.

    With pair terms, these are the uses of two choices: in each group the option that uses least, or most, with the
    average option of the other groups.
    """
    use, starts = problem.resources[resource], problem.group_offsets[:-1]
    terms = problem.resource_pairs.get(resource)
    numbers = [use, np.array([problem.fixed.get(resource, 0.0)]), *([] if terms is None else [terms.data])]
    whole = all(bool((values == np.floor(values)).all()) for values in numbers)
    if terms is None:
        fixed = problem.fixed.get(resource, 0.0)
        smallest, largest = (fixed + float(extreme.reduceat(use, starts).sum()) for extreme in (np.minimum, np.maximum))
        return smallest, largest, whole
    share = 1.0 / np.diff(problem.group_offsets)[problem.group_of]
    effect = use + terms @ share + terms.T @ share
    extremes = [np.lexsort((signed, problem.group_of))[starts] for signed in (effect, -effect)]
    smallest, largest = (problem.usage(chosen)[resource] for chosen in extremes)
    return min(smallest, largest), max(smallest, largest), whole


def _solved(
    problem: Problem,
    resource: str,
    solver: Solver,
    time_limit: float | None,
    seed: int | None,
    start: NDArray[np.int64] | None,
) -> SweepPoint:
    """Solve a single point, with bound and price from the dual and the choice from the solver."""
    begin = time.perf_counter()
    reduction, budget = scaled(problem.derived(offset=0.0)), problem.budgets[resource]
    seconds = float("inf") if time_limit is None else BOUND_SHARE * time_limit
    bound, price = _dual(reduction.problem, resource, seconds)
    if resource not in problem.resource_pairs and budget < (first := _first_step(problem, resource)):
        price = _dual(reduction.problem.with_budgets(**{resource: first}), resource, seconds)[1]  # else not unique
    spent = time.perf_counter() - begin
    rest = None if time_limit is None else time_limit - min(spent, BOUND_SHARE * time_limit)
    solution = solve(problem, solver, time_limit=rest, seed=seed, initial=start)
    solution = with_known(problem, solution, bounds=[problem.offset + reduction.lift_bound(bound)])
    return SweepPoint(budget=budget, price=price * reduction.unit, solution=solution)


def _dual(problem: Problem, resource: str, seconds: float) -> tuple[float, float]:
    """Return the dual bound of a problem, and the price of a resource."""
    if problem.paired_budgets:
        from solvers import paired_budgets  # compiled code, imported only when used

        bound, prices = paired_budgets.priced_bound(problem, seconds)
        return bound, prices[resource]
    from solvers.bounds.duality import dual_bound

    dual = dual_bound(problem, time_limit=seconds)
    return dual.value, dual.prices[resource]


def _first_step(problem: Problem, resource: str) -> float:
    """Return the second smallest possible use of a resource; the smallest one if there is no other."""
    use, starts = problem.resources[resource], problem.group_offsets[:-1]
    least, smallest = np.minimum.reduceat(use, starts), problem.minimum_usage()[resource]
    above = use - least[problem.group_of]
    return float(smallest + above[above > 0].min()) if above.any() else smallest


def _shared(problem: Problem, resource: str, points: list[SweepPoint]) -> tuple[SweepPoint, ...]:
    """Give every point the best of all choices within its budget, and the best of all bounds that hold for it."""
    shared: list[SweepPoint] = []
    bound = None
    for point in reversed(points):
        at_budget = problem.with_budgets(**{resource: point.budget})
        choices = [other.solution.choice for other in points if other.solution.choice is not None]
        solution = with_known(at_budget, point.solution, choices=choices, bounds=[bound])
        bound = solution.bound
        shared.append(replace(point, solution=solution))
    return tuple(reversed(shared))


def _nested(
    problem: Problem,
    resource: str,
    points: tuple[SweepPoint, ...],
    solver: Solver,
    time_limit: float | None,
    seed: int | None,
    notes: Journal | None,
    stop_reason: StopReason,
) -> tuple[tuple[SweepPoint, ...], StopReason]:
    """Return the points with choices that are nested in each other, and the stop reason, which may be given before."""

    def solve_point(restricted: Problem, start: NDArray[np.int64] | None) -> Solution:
        nonlocal stop_reason
        key = run_key("nested sweep", restricted, solver, time_limit, seed)
        value = None if notes is None else notes.get(key)
        if value is not None:
            return Solution.from_json(value, "the journal")
        if stop_reason is StopReason.INTERRUPTED:
            search = StatedSearch(restricted, solver=solver.name, seed=seed)
            if start is not None:
                search.offer(start)
            return search.solution(stop_reason, solver.option_values)
        solution = solve(restricted, solver, time_limit=time_limit, seed=seed, initial=start)
        if solution.stop_reason is StopReason.INTERRUPTED:
            stop_reason = StopReason.INTERRUPTED
        elif notes is not None:
            notes.add(key, solution.to_json())
        return solution

    stated = [Point(problem=problem.with_budgets(**{resource: p.budget}), solution=p.solution) for p in points]
    solutions = nested_solutions(stated, resource, solve_point)
    nested_points = [replace(point, solution=solution) for point, solution in zip(points, solutions, strict=True)]
    return tuple(nested_points), stop_reason


def _or(value: float | None, missing: float) -> float:
    return missing if value is None else value
