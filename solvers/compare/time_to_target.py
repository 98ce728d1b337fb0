"""Time to target: how long a solver takes to reach a given objective, estimated from runs with different seeds.

A run reaches the target in time t with probability p. With a restart every t seconds, the target is reached with 99 %
probability after ``t·ln(0.01)/ln(1 - p)`` seconds (Rønnow et al., doi:10.1126/science.1252319). p and t are estimated
from the seeds, so the result has two confidence intervals. The bootstrap resamples the runs (Efron,
doi:10.1214/aos/1176344552), so that times and the restart time vary too; but if all runs reached the target, it does
not reflect how few runs there were. The exact interval of p (Clopper & Pearson, doi:10.1093/biomet/26.4.404) does. If
no run reached the target, there is no estimate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
from numpy.typing import NDArray

from solvers.search import PROOF_TOLERANCE
from solvers.solution import Solution

CERTAINTY = 0.99
"""Probability with which the target is reached within the stated time."""

CONFIDENCE = 0.95
"""Coverage of the confidence intervals."""

RESAMPLES = 1000
"""Number of bootstrap samples, which are seeded, so that the same runs give the same interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeToTarget:
    """Time that one solver takes to reach an objective.

    Attributes:
        target: the objective to reach.
        runs, hits: number of runs, and number of runs that reached the target.
        restart_s: best time in seconds after which to restart a run, or None without a hit. It is the time of a hit
            with the smallest result, selected afterwards, as is usual.
        seconds: time in seconds to reach the target with `CERTAINTY`, or None without a hit.
        low_s, high_s: `CONFIDENCE` interval from the number of runs that had a hit by then, or None without a hit.
        bootstrap_low_s, bootstrap_high_s: `CONFIDENCE` interval over `RESAMPLES` samples of the runs, with
            replacement; the upper end is None if too many samples have no hit.
    """

    target: float
    runs: int
    hits: int
    restart_s: float | None
    seconds: float | None
    low_s: float | None
    high_s: float | None
    bootstrap_low_s: float | None
    bootstrap_high_s: float | None


def time_to_target(runs: Sequence[Solution], target: float) -> TimeToTarget:
    """Estimate the time to an objective from runs that differ only in their seeds.

    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers import solve
    >>> runs = [solve(layered_problem(4), "brute-force", seed=seed, presolve=False) for seed in range(3)]
    >>> found = time_to_target(runs, runs[0].objective)
    >>> found.hits, found.low_s <= found.seconds <= found.high_s  # which run is how fast is not the same every time
    (3, True)
    """
    reached_s = [first_hit(run, target) for run in runs]
    times = np.sort([np.inf if t is None else t for t in reached_s])  # (runs,)
    expected = _expected_s(times[None])[0]
    if not np.isfinite(times[0]):
        nothing = dict.fromkeys(("restart_s", "seconds", "low_s", "high_s", "bootstrap_low_s", "bootstrap_high_s"))
        return TimeToTarget(target=target, runs=len(runs), hits=0, **nothing)
    hits = 1 + int(np.argmin(expected))
    restart = float(times[hits - 1])
    low, high = share_interval(hits, len(runs))
    drawn = np.random.default_rng(0).integers(len(runs), size=(RESAMPLES, len(runs)))
    resampled = np.sort(_expected_s(np.sort(times[drawn], axis=1)).min(axis=1))
    outside = round((1 - CONFIDENCE) / 2 * RESAMPLES)  # samples beyond either end
    return TimeToTarget(
        target=target,
        runs=len(runs),
        hits=int(np.isfinite(times).sum()),
        restart_s=restart,
        seconds=float(expected[hits - 1]),
        low_s=restart * _restarts(high),
        high_s=restart * _restarts(low),
        bootstrap_low_s=float(resampled[outside]),
        bootstrap_high_s=float(resampled[-1 - outside]) if np.isfinite(resampled[-1 - outside]) else None,
    )


def target_near(best: float, within: float) -> float:
    """Return the objective that is above ``best`` by the fraction ``within`` of its absolute value."""
    return best + within * abs(best)


def first_hit(run: Solution, target: float) -> float | None:
    """Return when a run first had an objective at or below the target (up to rounding), or None."""
    limit = target + PROOF_TOLERANCE * abs(target)
    return next((point.t_s for point in run.trace if point.objective is not None and point.objective <= limit), None)


def share_interval(hits: int, runs: int) -> tuple[float, float]:
    """Return the exact `CONFIDENCE` interval of the probability of a hit, given ``hits`` in ``runs`` runs.

    >>> [round(end, 3) for end in share_interval(5, 20)]
    [0.087, 0.491]
    """
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if hits == 0 else float(scipy.special.betaincinv(hits, runs - hits + 1, tail))
    high = 1.0 if hits == runs else float(scipy.special.betaincinv(hits + 1, runs - hits, 1 - tail))
    return low, high


def _expected_s(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the time to target for restarts at each of ``times`` ``(draws, runs)``, sorted along the second axis."""
    count = times.shape[1]
    restarts = np.array([_restarts(hits / count) for hits in range(1, count + 1)])
    return np.asarray(times * restarts)


def _restarts(share: float) -> float:
    """Return the number of runs (≥ 1) to reach the target with `CERTAINTY`, if each does with probability ``share``."""
    return 1.0 if share >= CERTAINTY else math.log(1 - CERTAINTY) / math.log1p(-share)
