"""Curves of a comparison as plain numbers: objectives over time, and how much slower a solver is than the quickest.

Nothing is drawn here; `qcompress.plots` does. What always holds: every curve is a step function, given by where it
steps and the value from there on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.compare.suite import Suite
from solvers.compare.tables import Comparison
from solvers.compare.time_to_target import first_hit, target_near
from solvers.solution import Solution

LEAST_S = 1e-3
"""Seconds below which times count as equal: only the clock tells them apart."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """What a solver had after ``t_s`` seconds: ``(T,)`` objectives over its seeds; infinite before a first choice."""

    label: str
    t_s: NDArray[np.float64]
    median: NDArray[np.float64]
    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """``share[i]`` of all tasks a solver ends in at most ``ratio[i]`` times the quickest solver's time; both ``(T,)``.

    The first ratio is 1; the last share is what the solver ends at all.
    """

    label: str
    ratio: NDArray[np.float64]
    share: NDArray[np.float64]


def anytime(comparison: Comparison) -> tuple[Curve, ...]:
    """Each solver's incumbent over time, as step functions: median and range over the seeds.

    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> curve, = anytime(compare(layered_problem(4), ["brute-force"]))
    >>> bool(curve.median[-1] <= curve.median[0])
    True
    """
    return tuple(_curve(label, runs) for label, runs in comparison.solutions.items())


def performance_profile(compared: Comparison | Suite, *, within: float | None = None) -> tuple[Profile, ...]:
    """Performance profiles (Dolan & Moré, doi:10.1007/s101070100263) of the time to a target.

    A task is one problem with one seed; it is ended when the target is reached. A solver that was not run on a problem
    has not ended its tasks.

    Args:
        compared: one problem, or several.
        within: share of the best objective that is known, given or found, for another target than the comparison's; 0
            for the best itself.

    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> profile, = performance_profile(compare(layered_problem(4), ["brute-force"], seeds=(0, 1)))
    >>> profile.ratio.tolist(), profile.share.tolist()
    ([1.0], [1.0])
    """
    comparisons = [compared] if isinstance(compared, Comparison) else list(compared.comparisons.values())
    labels = list(
        dict.fromkeys(label for comparison in comparisons for label in (*comparison.solutions, *comparison.skipped))
    )
    tasks = [_end_times(comparison, labels, within) for comparison in comparisons]
    times = np.concatenate([np.maximum(task, LEAST_S) for task in tasks], axis=1)  # (labels, tasks)
    quickest = times.min(axis=0)
    with np.errstate(invalid="ignore"):  # nobody ended it: infinite for all
        ratios = np.where(np.isfinite(quickest), times / quickest, np.inf)
    steps = np.unique([1.0, *ratios[np.isfinite(ratios)]])
    return tuple(
        Profile(label=label, ratio=steps, share=(ratio[None, :] <= steps[:, None]).mean(axis=1))
        for label, ratio in zip(labels, ratios, strict=True)
    )


def _end_times(comparison: Comparison, labels: list[str], within: float | None) -> NDArray[np.float64]:
    """``(labels, seeds)`` when the target was reached; infinite for never."""
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
        for t, objective in points:  # in order of time, so the later ones overwrite
            row[times >= t] = objective
    return Curve(
        label=label, t_s=times, median=np.median(values, axis=0), lowest=values.min(axis=0), highest=values.max(axis=0)
    )
