"""The rows of the tables: one row per solver of a comparison, and one row per run.

Times over many runs or problems are summarised by shifted geometric means, which are dominated neither by the longest
nor by the shortest times (Achterberg, doi:10.14279/depositonce-1634, appendix A).
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.base import relative_gap
from solvers.compare.time_to_target import TimeToTarget, first_hit, time_to_target
from solvers.solution import Solution, StopReason

SHIFT_S = 1.0
"""Shift in seconds, added to every time before taking the geometric mean and subtracted afterwards."""

ERROR = "ERROR"
"""Status shown for a run that ended with an error and without a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """Reference values for the runs on one problem.

    Attributes:
        reference: best known objective, given or found, or None.
        bound: best bound that any run proved, or None.
        target: objective at or below which a run has reached the target, or None.
        time_limit: time limit of every run in seconds, or None.
    """

    reference: float | None
    bound: float | None
    target: float | None
    time_limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """Results of one solver over all its seeds.

    Attributes:
        label: name of the solver, with the options that differ from their defaults.
        feasible_share: fraction of runs that found a choice.
        target_share: fraction of runs that reached the target.
        best, median: best and median objective; runs without a choice count as infinite, and infinite values become
            None.
        above_best: `above` of the median, relative to the best known objective, given or found.
        gap: ``(median - bound) / |median|`` for the best bound that any solver proved, or None.
        bound: best bound that this solver proved, or None.
        wall_s, cpu_s: median wall time and processor time of a run (None if it was not recorded).
        mean_wall_s: shifted geometric mean of the wall times.
        mean_target_s: shifted geometric mean of the times to the target. A run that never reached it counts with the
            time limit, or with its wall time if that is longer or there is no limit.
        phases: median time in seconds by phase, as the solvers report it (build, solve, embedding, queue, access, …).
        statuses: number of runs with each status; ``ERROR`` for runs that ended with an error and without a choice.
        to_target: time to the target, or None without a target.
    """

    label: str
    feasible_share: float
    target_share: float
    best: float | None
    median: float | None
    above_best: float | None
    gap: float | None
    bound: float | None
    wall_s: float
    cpu_s: float | None
    mean_wall_s: float
    mean_target_s: float
    phases: Mapping[str, float]
    statuses: Mapping[str, int]
    to_target: TimeToTarget | None


def comparison_row(label: str, runs: Sequence[Solution], yardstick: Yardstick) -> ComparisonRow:
    """Compute the row of one solver."""
    objectives = [np.inf if run.objective is None else run.objective for run in runs]
    median = finite(statistics.median(objectives))
    processor = [seconds for run in runs if (seconds := run.details.get("cpu_s")) is not None]
    names = dict.fromkeys(name for run in runs for name in run.timing)
    return ComparisonRow(
        label=label,
        feasible_share=sum(run.feasible for run in runs) / len(runs),
        target_share=sum(reached(run, yardstick) for run in runs) / len(runs),
        best=finite(min(objectives)),
        median=median,
        above_best=above(median, yardstick.reference),
        gap=relative_gap(median, yardstick.bound),
        bound=max((run.bound for run in runs if run.bound is not None), default=None),
        wall_s=statistics.median(run.wall_s for run in runs),
        cpu_s=statistics.median(processor) if processor else None,
        mean_wall_s=shifted_geometric_mean(run.wall_s for run in runs),
        mean_target_s=shifted_geometric_mean(target_s(run, yardstick) for run in runs),
        phases={name: statistics.median(run.timing.get(name, 0.0) for run in runs) for name in names},
        statuses=dict(Counter(status_of(run) for run in runs)),
        to_target=None if yardstick.target is None else time_to_target(runs, yardstick.target),
    )


def run_rows(label: str, runs: Sequence[Solution], yardstick: Yardstick) -> list[dict[str, Any]]:
    """Return one row per run of a solver, for spreadsheets: plain values by column, None for missing values."""
    return [
        {
            "solver": label,
            "seed": run.seed,
            "status": status_of(run),
            "stop_reason": str(run.stop_reason),
            "feasible": run.feasible,
            "objective": run.objective,
            "bound": run.bound,
            "gap_to_bound": relative_gap(run.objective, yardstick.bound),
            "gap_to_best": above(run.objective, yardstick.reference),
            "target": yardstick.target,
            "to_target_s": None if yardstick.target is None else first_hit(run, yardstick.target),
            "time_limit_s": yardstick.time_limit,
            "wall_s": run.wall_s,
            "cpu_s": run.details.get("cpu_s"),
            **run.timing,
            "options": run.options,
            "error": run.details.get("error"),
            "versions": run.details.get("versions"),
            "machine": run.details.get("machine"),
        }
        for run in runs
    ]


def above(objective: float | None, best: float | None) -> float | None:
    """Return ``(objective - best) / |best|``, how far an objective lies above the best known one; 0 if it does not.

    None if one is missing, or if the best is 0, to which nothing can be relative.

    >>> above(3.0, 1.0), above(-3.0, -4.0), above(0.0, 0.0), above(1.0, 0.0)
    (2.0, 0.25, 0.0, None)
    """
    if objective is None or best is None:
        return None
    if objective <= best:
        return 0.0
    return (objective - best) / abs(best) if best != 0 else None


def status_of(run: Solution) -> str:
    """Return the status, or `ERROR` if the run ended with an error and without a choice."""
    return ERROR if run.stop_reason is StopReason.ERROR_RECOVERED and run.choice is None else str(run.status)


def reached(run: Solution, yardstick: Yardstick) -> bool:
    """Whether the run reached the target at any time."""
    return yardstick.target is not None and first_hit(run, yardstick.target) is not None


def target_s(run: Solution, yardstick: Yardstick) -> float:
    """Return when the run reached the target; if it never did, the time limit, or its wall time if that is longer."""
    hit = None if yardstick.target is None else first_hit(run, yardstick.target)
    return max(run.wall_s, yardstick.time_limit or 0.0) if hit is None else hit


def shifted_geometric_mean(seconds: Iterable[float], shift: float = SHIFT_S) -> float:
    """Compute ``(∏ (t + shift))^(1/n) - shift``.

    >>> shifted_geometric_mean([0.0, 3.0])
    1.0
    """
    return float(np.exp(np.log(np.array(list(seconds)) + shift).mean()) - shift)


def finite(value: float) -> float | None:
    """Return the value, or None if it is infinite."""
    return value if np.isfinite(value) else None
