"""From a Measurement and a budget to a Problem.

The terms between parts are taken at half strength. At full strength they predict random choices best, but a solver
does not choose at random: it seeks out the choices whose errors are predicted to cancel, and that cancelling is the
part of the prediction that holds least once many layers change together. ``benchmarks/cifar10_resnet20.py``
measures both.
"""

import math
from collections.abc import Mapping

import numpy as np

from formulations import Problem
from formulations.generators.prune_quantize import prune_quantize
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement

PAIR_STRENGTH = 0.5


CHANGES = "changes"
"""Name of the resource that `formulate` counts changed parts by."""


def formulate(
    measurement: Measurement, budget: Mapping[str, float], *, pairs: bool = True, changes: int | None = None
) -> Problem:
    """State the choice of options as a problem that any solver takes.

    Args:
        measurement: what `measure` gave.
        budget: resource → the most the compressed model may use in all. A value up to 1 is a fraction of the
            original, above 1 it is absolute: ``{"bytes": 0.15}``, ``{"bytes": 120_000, "macs": 0.5}``. Below a second
            of ``latency_s`` (see `time_options`) give the fraction, or ``Problem.with_budgets``.
        pairs: with the terms between different parts (at `PAIR_STRENGTH`); False gives the additive problem.
        changes: parts at most that take another option than they were measured at (a trust region, after
            `remeasure`): one more resource and budget.

    Raises:
        OptionsError: an unknown resource, or a budget that is no positive number.

    >>> from qcompress import measure, prune_quantize
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> measurement = measure(model, [torch.randn(32, 8)], prune_quantize(bits=(4, 8), sparsity=(0,)))
    >>> dict(formulate(measurement, {"bytes": 0.5}).budgets)
    {'bytes': 390.0}
    """
    if not budget:
        raise OptionsError(
            f"give at least one budget, as {{'bytes': 0.25}}; measured are: {', '.join(measurement.resources)}"
        )
    limits = {}
    for name, value in budget.items():
        if name not in measurement.resources:
            raise OptionsError(f"no resource is called {name!r}; measured are: {', '.join(measurement.resources)}")
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise OptionsError(
                f"the budget for {name} must be a positive number: a fraction of the original up to 1, "
                f"or an absolute amount above 1; found {value!r}"
            )
        original = measurement.original[name]
        limits[name] = float(value) if value > 1 else value * original
        if value <= 1 and float(original).is_integer():  # what comes in whole numbers
            limits[name] = math.floor(limits[name])
    resources = dict(measurement.resources)
    if changes is not None:
        sizes = [len(options) for options in measurement.transforms]
        resources[CHANGES] = np.concatenate([np.ones(size) for size in sizes])
        resources[CHANGES][np.cumsum([0, *sizes[:-1]]) + measurement.standing] = 0.0
        limits[CHANGES] = float(changes)
    return prune_quantize(
        [part.name for part in measurement.parts],
        measurement.labels,
        measurement.cost,
        resources,
        limits,
        factor=measurement.factor * PAIR_STRENGTH**0.5 if pairs else None,
        fixed=measurement.fixed,
        offset=measurement.standing_loss,
    )
