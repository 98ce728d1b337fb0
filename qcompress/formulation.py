"""From a Measurement and a budget to a Problem.

A solver seeks out the choices whose errors are predicted to cancel, and this cancellation is the least reliable part of
the prediction. The costs of single options are measured. The pair terms are products of a factor that was computed with
a different curvature. Costs and pair terms together need not be positive semidefinite, and a solver finds choices with
a negative predicted loss. Therefore each row of the factor is scaled until half its squared norm is at most the
measured cost of its option (`consistent_rows`), and the pair terms are weighted by the strength t (`PAIR_STRENGTH` by
default). Terms that are estimated from single samples are first multiplied by their share of signal, see
`qcompress.interactions`.
With the additive part ``A`` and the sum of its positive costs ``A⁺``,

    objective - offset = (A - t·A⁺) + t·(A⁺ - Σ_v ½‖F_v‖²) + t·½‖Σ_v F_v‖²  ≥  A - t·A⁺.

If no option is measured to lower the loss, this is ``(1 - t)·A ≥ 0`` for every choice.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.generators.prune_quantize import prune_quantize
from qcompress import budgets
from qcompress.errors import OptionsError
from qcompress.interactions import pair_terms
from qcompress.measurement import Measurement, require_measurement
from qcompress.measuring.pair_terms import PAIR_STRENGTH, consistent_rows
from qcompress.measuring.sums import error_of_sum
from qcompress.scalars import as_whole

CHANGES = "changes"
"""Name of the resource with which `formulate` counts changed parts."""


def formulate(
    measurement: Measurement,
    budget: Mapping[str, budgets.Amount],
    *,
    pairs: bool | float = True,
    changes: int | None = None,
) -> Problem:
    """State the choice of options as a problem that any solver accepts.

    Args:
        measurement: result of `measure`.
        budget: resource → maximum use of the whole compressed model. A number up to 1 is a share of the original, a
            number above 1 an amount; text states its unit: ``{"bytes": 0.15}``, ``{"bytes": 120_000}``,
            ``{"bytes": "120 kB", "macs": "50%", "latency_s": "20 ms"}``, ``{"bits_per_weight": 4.25}`` (see
            `qcompress.budgets`).
        pairs: whether to include pair terms: False for the additive problem, True for `PAIR_STRENGTH`, or their
            strength from 0.0 to 1.0. The objective of a choice is never below ``1 - strength`` times its additive part,
            and the objective of a single change is its measured cost.
        changes: maximum number of parts that may change their option from ``measurement.standing`` (a trust region,
            after `remeasure`); adds one resource with its budget.

    Raises:
        OptionsError: a resource or unit is unknown, a budget is not a positive number, or the strength is outside its
            range.

    >>> from qcompress import measure, prune_quantize
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> measurement = measure(model, [torch.randn(32, 8)], prune_quantize(bits=(4, 8), sparsity=(0,)))
    >>> dict(formulate(measurement, {"bytes": 0.5}).budgets)
    {'bytes': 390.0}
    """
    require_measurement(measurement)
    strength = pair_strength(pairs)
    measurement = budgets.with_resources(measurement, budget)
    limits = budgets.limits(measurement, budget)
    resources = dict(measurement.resources)
    if changes is not None:
        sizes = [len(options) for options in measurement.transforms]
        resources[CHANGES] = np.concatenate([np.ones(size) for size in sizes])
        resources[CHANGES][np.cumsum([0, *sizes[:-1]]) + measurement.standing] = 0.0
        limits[CHANGES] = float(as_whole(changes, "changes", least=0))
    problem = prune_quantize(
        [part.name for part in measurement.parts],
        measurement.labels,
        measurement.cost,
        resources,
        limits,
        fixed=measurement.fixed,
        offset=measurement.standing_loss,
    )
    rows = consistent_rows(measurement.factor, measurement.cost)
    return problem.derived(resource_pairs=measurement.resource_pairs, pairs=pair_terms(measurement, rows, strength))


def prediction_error(measurement: Measurement, problem: Problem, choice: NDArray[np.int64]) -> float | None:
    """Return the standard error of a choice's objective, from its spread over the samples; None if unknown.

    It includes the error of pair terms between all parts, but not that of pair terms within blocks only, and what was
    left out of single costs because it stood out (see `qcompress.measuring.outlying`). The errors of options that were
    run alone add up, as they all come from the same few samples.

    Args:
        measurement: measurement that the problem was formulated from, with one column of its factor per sample.
        problem: problem whose pair terms are those of the measurement, at any strength.
        choice: ``(G,)`` option of each group.
    """
    if measurement.standard_error is None or any(measurement.standing):
        return None  # the factor of a remeasured model lacks the slope
    chosen = problem.flat(choice)
    costs, between = 0.5 * np.square(measurement.factor[chosen]), np.zeros(measurement.factor.shape[1])
    errors, alone = measurement.standard_error[chosen], 0.0
    if measurement.ran is not None:
        ran = measurement.ran[chosen]
        alone = float(errors[ran].sum())
        costs[ran], errors[ran] = 0.0, 0.0  # the cost is not that of the columns
    rows = None if problem.pairs is None else problem.pairs.factor
    if rows is not None and rows.shape[1] == len(between):
        picked = rows[chosen]
        between = np.einsum("gr,gr->r", np.cumsum(picked[:-1], axis=0), picked[1:])
    return math.hypot(error_of_sum(costs, errors, measurement.num_samples, between), alone)


def at_strength(problem: Problem, measurement: Measurement, strength: float) -> Problem:
    """Return ``problem``, made from ``measurement``, with its pair terms at another strength from 0.0 to 1.0."""
    rows = consistent_rows(measurement.factor, measurement.cost)
    return problem.derived(pairs=pair_terms(measurement, rows, strength))


def at_softened_outputs(problem: Problem, measurement: Measurement, strength: float, *, share: float = 1.0) -> Problem:
    """Return ``problem``, made from ``measurement``, with costs at softened outputs (see `Measurement.softened`).

    The pair terms keep the directions of the factor; each row is rescaled to match its option's cost.

    Args:
        problem: the problem.
        measurement: the measurement that it was made from.
        strength: strength of the pair terms.
        share: share of the softened costs in a mean with the plain ones.
    """
    assert measurement.softened is not None  # noqa: S101
    cost = np.maximum((1 - share) * measurement.cost + share * measurement.softened, 0.0)
    half_square = 0.5 * np.square(measurement.factor).sum(axis=1)
    scale = np.sqrt(np.divide(cost, half_square, out=np.zeros_like(cost), where=half_square > 0))
    return problem.derived(cost=cost, pairs=pair_terms(measurement, measurement.factor * scale[:, None], strength))


def pair_strength(pairs: bool | float) -> float:
    """Return the strength that ``pairs`` of `formulate` stands for.

    Raises:
        OptionsError: ``pairs`` is neither a boolean nor a number from 0 to 1.

    >>> pair_strength(True), pair_strength(False), pair_strength(0.25)
    (0.5, 0.0, 0.25)
    """
    if isinstance(pairs, bool):
        return PAIR_STRENGTH if pairs else 0.0
    if not (isinstance(pairs, (int, float)) and 0 <= pairs <= 1):
        raise OptionsError(f"pairs must be True, False or a strength from 0.0 to 1.0, found {pairs!r}")
    return float(pairs)
