"""Several solvers on one problem, each with several seeds: who finds what, how soon, and how far from the proof.

`compare` runs them and keeps every `Solution`; the table (`Comparison.rows`) and the anytime curves (`anytime`) are
computed from those, so that a comparison loaded from its file shows the same. All solvers are measured against the
same yardstick: the best bound that any of them proved.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import FileFormatError, Problem
from formulations.files import AnyPath, read_json, write_json
from solvers.base import Solver, relative_gap
from solvers.errors import InvalidOptionError, SolverUnavailableError, UnsupportedProblemError
from solvers.run import as_solver, solve
from solvers.solution import Solution

FILE_KIND = "qcompress comparison"
FILE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One solver over all its seeds.

    Attributes:
        label: its name, with the options that differ from their defaults.
        feasible_share: runs that found a choice, over all runs.
        best, median: objectives; a run without a choice counts as infinite, an infinite value is given as None.
        above_best: ``(median - b) / |median|`` for the best objective b that any solver found, or None.
        gap: ``(median - bound) / |median|`` for the best bound that any solver proved, or None.
        bound: the best bound of its own, or None.
        wall_s: median time of a run.
        statuses: how often each status came.
    """

    label: str
    feasible_share: float
    best: float | None
    median: float | None
    above_best: float | None
    gap: float | None
    bound: float | None
    wall_s: float
    statuses: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What a solver had after ``t_s`` seconds: ``(T,)`` objectives over its seeds; infinite before a first choice."""

    label: str
    t_s: NDArray[np.float64]
    median: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Every run of a comparison: label → Solutions in the order of ``seeds``.

    Attributes:
        problem_fingerprint: of the problem that all of them solved.
        skipped: label → why this solver was not run (it cannot take the problem, or a package is missing).
    """

    problem_fingerprint: str
    time_limit: float | None
    seeds: tuple[int, ...]
    solutions: Mapping[str, tuple[Solution, ...]]
    skipped: Mapping[str, str]

    @property
    def best(self) -> float | None:
        """The best objective that any run found."""
        return min((run.objective for run in self._runs() if run.objective is not None), default=None)

    @property
    def bound(self) -> float | None:
        """The best bound that any run proved (not above the best objective, where rounding alone could put it)."""
        bound = max((run.bound for run in self._runs() if run.bound is not None), default=None)
        return bound if bound is None or self.best is None else min(bound, self.best)

    def rows(self) -> tuple[Row, ...]:
        """The table, best median first; among equals the quicker one."""
        rows = [_row(label, runs, self.best, self.bound) for label, runs in self.solutions.items()]
        return tuple(sorted(rows, key=lambda row: (row.median is None, row.median or 0.0, row.wall_s)))

    def to_markdown(self) -> str:
        """The table as Markdown."""
        lines = [
            "| solver | median objective | best | above best | gap to bound | own bound | feasible | time | status |",
            "|---|--:|--:|--:|--:|--:|--:|--:|---|",
        ]
        for row in self.rows():
            numbers = [_number(row.median), _number(row.best), _percent(row.above_best), _percent(row.gap)]
            numbers += [_number(row.bound), f"{row.feasible_share:.0%}", f"{row.wall_s:.2f} s"]
            statuses = ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())
            lines.append(f"| {row.label} | {' | '.join(numbers)} | {statuses} |")
        lines += [
            "",
            f"Best objective {_number(self.best)}, best bound {_number(self.bound)}, seeds {list(self.seeds)}.",
        ]
        lines += [f"Not run: {label} ({why})." for label, why in self.skipped.items()]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        runs = {label: [run.to_json() for run in runs] for label, runs in self.solutions.items()}
        header = {"kind": FILE_KIND, "version": FILE_VERSION, "problem_fingerprint": self.problem_fingerprint}
        settings = {"time_limit": self.time_limit, "seeds": self.seeds, "skipped": dict(self.skipped)}
        return {**header, **settings, "solutions": runs}

    def save(self, path: AnyPath) -> None:
        """Write every run as JSON, whole or not at all."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON, or of a newer version.
        """
        value = read_json(path, FILE_KIND)
        kind, version = value.get("kind"), value.get("version")
        if kind != FILE_KIND or not isinstance(version, int) or version > FILE_VERSION:
            raise FileFormatError(
                f"{path} is no {FILE_KIND} file up to version {FILE_VERSION}: found {kind!r}, version {version!r}"
            )
        try:
            return cls(
                problem_fingerprint=value["problem_fingerprint"],
                time_limit=value["time_limit"],
                seeds=tuple(value["seeds"]),
                solutions={
                    label: tuple(Solution.from_json(run, str(path)) for run in runs)
                    for label, runs in value["solutions"].items()
                },
                skipped=dict(value["skipped"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is no whole {FILE_KIND} file: {error!r}") from error

    def _runs(self) -> list[Solution]:
        return [run for runs in self.solutions.values() for run in runs]


def compare(
    problem: Problem,
    solvers: Iterable[Any],
    *,
    time_limit: float | None = None,
    seeds: Iterable[int] = (0,),
    on_run: Callable[[str, Solution], None] | None = None,
) -> Comparison:
    """Run every solver with every seed on one problem.

    Args:
        problem: what to solve.
        solvers: names, `Solver` classes or instances (which may differ in their options), dimod samplers.
        time_limit: seconds for every run.
        seeds: one run for each.
        on_run: called with label and Solution after every run.

    Raises:
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.
        UnknownSolverError, InvalidOptionError: no such solver, the same one twice, or nothing to run.

    >>> from formulations.instances import layered_problem
    >>> comparison = compare(layered_problem(4), ["brute-force"], seeds=(0, 1))
    >>> [(row.label, row.feasible_share, row.gap, dict(row.statuses)) for row in comparison.rows()]
    [('brute-force', 1.0, 0.0, {'OPTIMAL': 2})]
    """
    back_ends = [as_solver(solver) for solver in solvers]
    numbers = tuple(int(seed) for seed in seeds)
    labels = [_label(solver) for solver in back_ends]
    if not back_ends or not numbers:
        raise InvalidOptionError(f"compare needs at least one solver and one seed, found {labels} and {list(numbers)}")
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InvalidOptionError(f"compare runs every solver once; given twice: {', '.join(twice)}")
    problem.require_reachable_budgets()
    solutions: dict[str, tuple[Solution, ...]] = {}
    skipped: dict[str, str] = {}
    for label, solver in zip(labels, back_ends, strict=True):
        try:
            solver.require(problem)
        except (SolverUnavailableError, UnsupportedProblemError) as error:
            skipped[label] = str(error)
            continue
        runs = []
        for seed in numbers:
            runs.append(solve(problem, solver, time_limit=time_limit, seed=seed))
            if on_run is not None:
                on_run(label, runs[-1])
        solutions[label] = tuple(runs)
    return Comparison(
        problem_fingerprint=problem.fingerprint(),
        time_limit=time_limit,
        seeds=numbers,
        solutions=solutions,
        skipped=skipped,
    )


def anytime(comparison: Comparison) -> tuple[Curve, ...]:
    """For every solver the incumbent's objective over time, as step functions: median and range over the seeds.

    >>> from formulations.instances import layered_problem
    >>> curve, = anytime(compare(layered_problem(4), ["brute-force"]))
    >>> bool(curve.median[-1] <= curve.median[0])
    True
    """
    return tuple(_curve(label, runs) for label, runs in comparison.solutions.items())


def _curve(label: str, runs: tuple[Solution, ...]) -> Curve:
    found = [[(p.t_s, p.objective) for p in run.trace if p.objective is not None] for run in runs]
    times = np.unique([0.0, *(t for points in found for t, _ in points), *(run.wall_s for run in runs)])
    values = np.full((len(runs), len(times)), np.inf)
    for row, points in zip(values, found, strict=True):
        for t, objective in points:  # in order of time, so the later ones overwrite
            row[times >= t] = objective
    return Curve(
        label=label, t_s=times, median=np.median(values, axis=0), lowest=values.min(axis=0), highest=values.max(axis=0)
    )


def _row(label: str, runs: tuple[Solution, ...], best: float | None, bound: float | None) -> Row:
    objectives = [np.inf if run.objective is None else run.objective for run in runs]
    median = _finite(statistics.median(objectives))
    return Row(
        label=label,
        feasible_share=sum(run.feasible for run in runs) / len(runs),
        best=_finite(min(objectives)),
        median=median,
        above_best=relative_gap(median, best),
        gap=relative_gap(median, bound),
        bound=max((run.bound for run in runs if run.bound is not None), default=None),
        wall_s=statistics.median(run.wall_s for run in runs),
        statuses=dict(Counter(str(run.status) for run in runs)),
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _label(solver: Solver) -> str:
    defaults = solver.option_defaults()
    changed = [f"{name}={value!r}" for name, value in solver.option_values.items() if value != defaults[name]]
    return f"{solver.name}({', '.join(changed)})" if changed else solver.name


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.3%}"
