"""Curves of a comparison as plain numbers: objectives over time, and performance relative to the fastest solver.

Plots of them are in `qcompress.plots`. Every curve is a step function, given by the positions of its steps and the
values from there on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.compare.suite import Suite
from solvers.compare.tables import Comparison
from solvers.compare.time_to_target import first_hit, target_near
from solvers.solution import Solution

LEAST_S = 1e-3
"""Times in seconds below this count as equal, because their differences are noise."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Objectives of a solver over its seeds after ``t_s`` seconds, ``(T,)``; infinite before a first choice."""

    label: str
    t_s: NDArray[np.float64]
    median: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """Fraction ``share[i]`` of tasks that a solver finishes within ``ratio[i]`` times the fastest time, both ``(T,)``.

    The first ratio is 1; the last share is the fraction of tasks that the solver finishes at all.
    """

    label: str
    ratio: NDArray[np.float64]
    share: NDArray[np.float64]


def anytime(comparison: Comparison) -> tuple[Curve, ...]:
    """Return each solver's incumbent objective over time as step functions: median and range over the seeds.

    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> curve, = anytime(compare(layered_problem(4), ["brute-force"]))
    >>> bool(curve.median[-1] <= curve.median[0])
    True
    """
    return tuple(_curve(label, runs) for label, runs in comparison.solutions.items())


def performance_profile(compared: Comparison | Suite, *, within: float | None = None) -> tuple[Profile, ...]:
    """Compute performance profiles (Dolan & Moré, doi:10.1007/s101070100263) of the time to a target.

    A task is one problem with one seed. It is finished when the target is reached. A solver that was not run on a
    problem has not finished its tasks. Problems that were proven infeasible are left out, unless there are no others.

    Args:
        compared: a comparison on one problem, or on several.
        within: a different target than the comparison's, as a fraction of the best known objective (given or found); 0
            for the best objective itself.

    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> profile, = performance_profile(compare(layered_problem(4), ["brute-force"], seeds=(0, 1)))
    >>> profile.ratio.tolist(), profile.share.tolist()
    ([1.0], [1.0])
    """
    comparisons = [compared] if isinstance(compared, Comparison) else list(compared.comparisons.values())
    comparisons = [comparison for comparison in comparisons if not comparison.infeasible] or comparisons
    labels = list(
        dict.fromkeys(label for comparison in comparisons for label in (*comparison.solutions, *comparison.skipped))
    )
    tasks = [_end_times(comparison, labels, within) for comparison in comparisons]
    times = np.concatenate([np.maximum(task, LEAST_S) for task in tasks], axis=1)  # (labels, tasks)
    quickest = times.min(axis=0)
    with np.errstate(invalid="ignore"):  # infinite for all solvers if none finished the task
        ratios = np.where(np.isfinite(quickest), times / quickest, np.inf)
    steps = np.unique([1.0, *ratios[np.isfinite(ratios)]])
    return tuple(
        Profile(label=label, ratio=steps, share=(ratio[None, :] <= steps[:, None]).mean(axis=1))
        for label, ratio in zip(labels, ratios, strict=True)
    )


def _end_times(comparison: Comparison, labels: list[str], within: float | None) -> NDArray[np.float64]:
    """Return when the target was reached, ``(labels, seeds)``; infinite for never."""
    times = np.full((len(labels), len(comparison.seeds)), np.inf)
    reference = comparison.reference
    target = comparison.target if within is None or reference is None else target_near(reference, within)
    if target is None:
        return times
    for row, label in zip(times, labels, strict=True):
        for number, run in enumerate(comparison.solutions.get(label, ())):
            hit = first_hit(run, target)
            if hit is not None:
                row[number] = hit
    return times


def _curve(label: str, runs: tuple[Solution, ...]) -> Curve:
    courses = [[(p.t_s, p.objective) for p in run.trace if p.objective is not None] for run in runs]
    times = np.unique([0.0, *(t for points in courses for t, _ in points), *(run.wall_s for run in runs)])
    values = np.full((len(runs), len(times)), np.inf)
    for row, points in zip(values, courses, strict=True):
        for t, objective in points:  # in order of time, so later points overwrite
            row[times >= t] = objective
    return Curve(
        label=label, t_s=times, median=np.median(values, axis=0), lowest=values.min(axis=0), highest=values.max(axis=0)
    )
