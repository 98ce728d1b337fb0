"""Turn the samples of an answer into choices, with results and times reported for each step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formulations import Problem
from solvers.base import Search
from solvers.kernels.moves import Floats, judge_all, to_arrays
from solvers.leap.forms import Samples
from solvers.qubo.samples import Improver

HISTOGRAM_BINS = 20


def take(problem: Problem, search: Search, samples: Samples) -> None:
    """Repair and polish samples, with the results of each step reported in the unit of the original problem."""
    improver = Improver(problem, search, to_arrays(problem))
    improver.take(samples.choices, samples.valid)
    improver.quality.tell(search)
    search.details |= samples.details
    if "chain_strength" in samples.details:
        search.note(chain_strength=samples.details["chain_strength"])
    if samples.energies is not None and len(samples.energies):
        search.details["energy_histogram"] = _histogram(search.unit * samples.energies)
    if len(samples.choices):
        search.details["share_best"] = _share_best(problem, samples)


def times(states: Sequence[Any], timing_us: Mapping[str, float]) -> dict[str, float]:
    """Return the times in seconds: queue, solving, quantum processor and charge, as far as the service gives them.

    The queue lasts from the first submission to the last answer, without the time of solving.
    """
    named = {"run_time": "solve_s", "qpu_access_time": "qpu_s", "charge_time": "charge_s"}
    seconds = {ours: timing_us[name] / 1e6 for name, ours in named.items() if name in timing_us}
    if all(state.solved_on is not None for state in states):
        last, first = max(state.solved_on for state in states), min(state.submitted_on for state in states)
        total = (last - first).total_seconds()
        seconds["queue_s"] = max(0.0, total - seconds.get("solve_s", seconds.get("qpu_s", 0.0)))
    return seconds


def time_to_solution(read_s: float, share: float) -> float | None:
    """Return the processor time in seconds to reach the best objective with 99 % probability, without the queue.

    >>> round(time_to_solution(0.001, 0.9), 6)
    0.002
    """
    if share <= 0.0:
        return None
    return read_s * max(1.0, math.log(0.01) / math.log1p(-share) if share < 1.0 else 1.0)


def _share_best(problem: Problem, samples: Samples) -> float:
    """Return the fraction of samples that reached the best feasible objective, before repair and polish."""
    values, excess = judge_all(to_arrays(problem), samples.choices + problem.group_offsets[:-1])
    values = np.where(excess == 0, values, np.inf)
    return float(np.isclose(values, values.min(), rtol=1e-9, atol=1e-12).mean()) if np.isfinite(values).any() else 0.0


def _histogram(energies: Floats) -> dict[str, list[float]]:
    low, high = float(energies.min()), float(energies.max())
    high = max(high, low + 1e-6 * (max(abs(low), abs(high)) or 1.0))  # all energies may be equal
    counts, edges = np.histogram(energies, bins=HISTOGRAM_BINS, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
