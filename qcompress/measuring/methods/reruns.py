"""Select the options of a ``"sampled"`` measurement to run in the model as well, and replace their estimated costs.

An estimated cost is wrong by a quarter or more, and by far more where the loss is not quadratic or the option changes a
router's choices, which no gradient shows. Running an option on a few samples gives its true loss increase within a
fifth. Therefore some options are run alone: first those of routers (`routers`), whose error is unknown, then those
whose error matters most. Options are ordered by the geometric mean of their error and of its share of the predicted
loss of a likely choice: the error alone would select only the harshest options, the share alone only the mildest. The
likely choices are those of `likely_choices`, and every part at its smallest. An error counts at least as much as with
normally distributed effects, because an estimate that is too small by chance also has too small an error.

All runs together take at most the work of `PASSES` forward passes over the samples (a forward and backward pass counts
as three). Every run uses the same samples: an eighth of all, evenly spread, but at least `LEAST_SAMPLES`.

The result of a run is not averaged with the estimate: the estimate would get the largest weight where it is too small
by chance. A larger result replaces the estimate. A smaller one replaces it only if its relative error is smaller and,
over all runs, below `ALIKE`, because the mean of a few samples that differ much is usually too small, and so is its
error.

An option whose loss is not finite in its run is left out: at any finite cost it could be chosen.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qcompress.measurement import Measurement, has_choice
from qcompress.measuring.effects import likely_choices

PASSES = 2
"""Forward passes over all samples that the runs may take together."""

LEAST_SAMPLES, SHARE = 4, 8
"""Least number of samples of each run, and how many times as many the measurement has."""

ALIKE = 0.25
"""Root mean square of the relative errors of all runs, below which a few samples represent all."""

SIGNAL_TO_ROUNDING = 10.0
"""Smallest ratio of a loss increase to the one by rounding alone at which it is known."""

NOT_IN_FLOAT32 = "no option was run alone: the model computes in half precision, which rounds its loss away"

NOT_FINITE = "the loss is not finite with options that were run alone, which are left out: "
ALL_NOT_FINITE = "the loss is not finite with its options"


def sample_places(count: int) -> list[int]:
    """Return the indices of the samples that options are run on, of ``count`` samples.

    >>> sample_places(3), sample_places(10), len(sample_places(80))
    ([0, 1, 2], [0, 2, 5, 7], 10)
    """
    wanted = min(count, max(LEAST_SAMPLES, -(-count // SHARE)))
    return [count * place // wanted for place in range(wanted)]


def options_to_run(measurement: Measurement, count: int) -> list[int]:
    """Return the (flat) options to run, in the order of their importance.

    Args:
        measurement: measurement by ``"sampled"`` from an original.
        count: number of its samples.
    """
    offsets, cost, size_bytes = measurement.offsets, measurement.cost, measurement.resources["bytes"]
    error = _error(measurement, count)
    smallest = [start + int(size_bytes[start:stop].argmin()) for start, stop in itertools.pairwise(offsets.tolist())]
    importance = np.zeros(len(cost))
    for chosen in (*likely_choices(cost, size_bytes, offsets), np.array(smallest)):
        total = float(np.maximum(cost[chosen], 0.0).sum())
        if total > 0:
            importance[chosen] = np.maximum(importance[chosen], error[chosen] / total**0.5)
    first = _of_routers(measurement)
    useful = (first | (importance > 0)) & ~_exact(measurement)
    order = np.lexsort((-importance, ~first))
    limit = max(PASSES * count // len(sample_places(count)) - 1, 0)  # one run is of the original
    return [int(flat) for flat in order if useful[flat]][:limit]


def routers(measurement: Measurement) -> dict[str, int | None]:
    """Module that selects → index of the part that it does so with, the smallest inside; None if there is none.

    The weight of a router has one row for each expert, whose own weights may be in the same module.
    """
    found: dict[str, int | None] = {}
    for path in measurement.selecting:
        inside = [
            index
            for index, part in enumerate(measurement.parts)
            if path and any(f"{module}.".startswith(f"{path}.") for module in part.modules)
        ]
        found[path] = min(inside, key=lambda index: measurement.parts[index].target.num_weights, default=None)
    return found


def unconfirmed(measurement: Measurement) -> tuple[str, ...]:
    """Return the paths of the modules that select and have an option with estimated cost, or no option at all."""
    known = _exact(measurement) if measurement.ran is None else _exact(measurement) | measurement.ran
    bounds = list(itertools.pairwise(measurement.offsets.tolist()))
    return tuple(
        path for path, part in routers(measurement).items() if part is None or not known[slice(*bounds[part])].all()
    )


def _error(measurement: Measurement, count: int) -> NDArray[np.float64]:
    """Return ``(V,)`` error of every cost, at least that of normally distributed effects."""
    least: NDArray[np.float64] = np.abs(measurement.cost) * (2 / count) ** 0.5
    return least if measurement.standard_error is None else np.maximum(least, measurement.standard_error)


def _of_outliers(measurement: Measurement, count: int) -> NDArray[np.float64]:
    """Return ``(V,)``: the error of each estimate beyond the spread of its limited effects, if it has no other."""
    assert measurement.standard_error is not None  # noqa: S101
    shares = 0.5 * np.square(measurement.factor)
    beyond = np.square(measurement.standard_error) - shares.var(axis=1, ddof=1) * count
    limited = np.isclose(shares.sum(axis=1), measurement.cost, atol=0.0)  # no slope, and a column for every sample
    return np.where(limited, np.sqrt(np.maximum(beyond, 0.0)), 0.0)


def _exact(measurement: Measurement) -> NDArray[np.bool_]:
    """Return ``(V,)`` whether an option is the original weight, or was evaluated on all samples."""
    exact = _options_of(measurement, [i for i, part in enumerate(measurement.parts) if part.name in measurement.tried])
    exact[measurement.offsets[:-1]] = True
    return exact


def _of_routers(measurement: Measurement) -> NDArray[np.bool_]:
    return _options_of(measurement, [part for part in routers(measurement).values() if part is not None])


def _options_of(measurement: Measurement, parts: Sequence[int]) -> NDArray[np.bool_]:
    """Return ``(V,)`` whether an option belongs to one of some parts."""
    return np.repeat(np.isin(np.arange(len(measurement.parts)), parts), np.diff(measurement.offsets))


def with_runs(
    measurement: Measurement,
    count: int,
    runs: Sequence[int],
    rises: NDArray[np.float64],
    sizes: Sequence[int],
    rounding: float = 0.0,
) -> Measurement:
    """Return the measurement with the costs that running some options found.

    The error of a run is that of the mean over its samples. A spread over so few is itself uncertain, so none counts as
    smaller, relative to its cost, than the root mean square of all runs. Added is what limiting effects took off
    the estimate (`qcompress.measuring.outlying`): the samples that were run may lack the one that it is about.
    The errors of estimates are scaled by how far runs lie from them, see `_scale`.

    Args:
        measurement: the measurement.
        count: number of its samples.
        runs: ``(runs,)`` options.
        rises: ``(runs, samples)`` their loss increases; an option with one that is not finite is left out.
        sizes: ``(samples,)`` weights of the samples: batches that are not taken apart differ in their number of rows.
        rounding: loss increase by rounding alone; a smaller increase than `SIGNAL_TO_ROUNDING` times it is not known.
    """
    chosen, finite = np.array(runs, dtype=np.int64), np.isfinite(rises).all(axis=1)
    if not finite.all():
        usable, lost = chosen[finite].tolist(), chosen[~finite].tolist()
        rest = with_runs(measurement, count, usable, rises[finite], sizes, rounding) if usable else measurement
        return _without(rest, lost)
    weights = np.array(sizes) / sum(sizes)
    means = rises @ weights
    cost, errors, size = measurement.cost.copy(), measurement.standard_error, np.abs(means)
    known = size >= SIGNAL_TO_ROUNDING * rounding
    better = known
    if errors is not None:
        spread = np.square((rises - means[:, None]) * weights).sum(axis=1)
        own = (spread * len(weights) / (len(weights) - 1)) ** 0.5
        share = np.divide(own, size, out=np.zeros_like(own), where=size > 0)
        pooled = float(np.square(share).mean()) ** 0.5
        found = np.maximum(own, size * pooled)
        before = _error(measurement, count)[chosen]
        measured = known & ~_of_routers(measurement)[chosen]
        scale = _scale((means - cost[chosen])[measured] / np.hypot(found, before)[measured])
        surer = (found * np.abs(cost[chosen]) < before * size) & (pooled < ALIKE)
        better = known & (surer | (means > cost[chosen]))
        errors = np.where(_exact(measurement), errors, scale * errors)
        errors[chosen[better]] = np.hypot(found, _of_outliers(measurement, count)[chosen])[better]
    cost[chosen[better]] = means[better]
    ran = np.isin(np.arange(len(cost)), chosen[known])
    return replace(measurement, cost=cost, standard_error=errors, ran=ran)


def _scale(distances: NDArray[np.float64]) -> float:
    """Return the factor, at least 1, by which to enlarge the errors of estimates.

    The spread of the samples' effects does not cover losses of higher order, which options of few bits have. Therefore
    errors are scaled until the runs' distances from the estimates, in units of these errors, have a root mean square of
    1, as the Particle Data Group does with measurements that disagree (DOI 10.1103/PhysRevD.110.030001, section 5.2.2).

    >>> _scale(np.array([0.5, -0.2, 0.3])), _scale(np.array([2.0, -2.0, 2.0, 2.0]))
    (1.0, 2.0)
    """
    return max(1.0, float(np.square(distances).mean()) ** 0.5) if len(distances) > 1 else 1.0


def _without(measurement: Measurement, lost: Collection[int]) -> Measurement:
    """Return the measurement without the (flat) options whose loss is not finite."""
    bounds = itertools.pairwise(measurement.offsets.tolist())
    options = [[flat - start for flat in range(start, stop) if flat not in lost] for start, stop in bounds]
    found = measurement.restricted(options)
    names, no_choice = [], dict(measurement.no_choice)
    for part, own, kept, left in zip(measurement.parts, measurement.labels, options, found.transforms, strict=True):
        gone = [f"{part.name!r} at {label!r}" for option, label in enumerate(own) if option not in kept]
        names += gone
        if gone and not has_choice(left):
            no_choice[part.name] = ALL_NOT_FINITE
    notes = (*measurement.notes, NOT_FINITE + ", ".join(names))
    return replace(found, no_choice=MappingProxyType(no_choice), notes=notes)
