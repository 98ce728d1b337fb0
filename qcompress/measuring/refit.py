"""Collect the statistics that codes and factors are fitted to again, over more data.

These are the second moments and mean squares of layers' inputs. Costs and effects keep their measured values, and so do
the choices made from them; the options take the same bytes. Only the result of fitting in `qcompress.apply` changes.
"""

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from qcompress.measurement import Measurement
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.inputs.squares import input_squares
from qcompress.model import forward as forwards
from qcompress.model.composed import composed
from qcompress.model.modes import outside_modes, seeded
from qcompress.model.steady import steady


@outside_modes
@seeded
def refit(
    model: nn.Module,
    data: Iterable[Any],
    measurement: Measurement,
    *,
    forward: forwards.Forward | None = None,
    seed: int = 0,
) -> Measurement:
    """Return the measurement with the moments and squares of ``data``, where it has any; encoded options are dropped.

    Args:
        model: the model that was measured.
        data: re-iterable batches.
        measurement: the result of `measure`.
        forward: same as in `measure`.
        seed: same as in `measure`.

    Raises:
        DataError: the inputs of a layer are not finite, or a layer is not called.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> model, data = nn.Sequential(nn.Linear(3, 2)), [torch.eye(3), 3 * torch.eye(3)]
    >>> measurement = measure(model, data[:1], prune_quantize(bits=(3,), sparsity=(0,), compensated=True))
    >>> again = refit(model, data, measurement)
    >>> [(float(own.moments["0"].trace().round()), own.num_inputs["0"]) for own in (measurement, again)]
    [(1.0, 3), (5.0, 6)]
    """
    run = steady(forward, seed)
    fitted = [part for part in measurement.parts if part.path in measurement.moments]
    weighed = [part for part in measurement.parts if part.path in measurement.squares]
    with composed(model), forwards.evaluating(model):
        moments, num_inputs = second_moments(model, fitted, data, run) if fitted else ({}, {})
        squares = input_squares(model, weighed, data, run, moments) if weighed else {}
    shared = {id(table): table.numpy() for table in moments.values()}  # layers with the same inputs share one
    return replace(
        measurement,
        moments=MappingProxyType({path: shared[id(table)] for path, table in moments.items()}),
        num_inputs=MappingProxyType(num_inputs),
        squares=MappingProxyType({path: values.numpy() for path, values in squares.items()}),
        codes={},
    )


def with_fit_of(measurement: Measurement, other: Measurement) -> Measurement:
    """Return the measurement with the statistics that `refit` collected in another one of the same model."""
    return replace(
        measurement,
        moments=other.moments,
        num_inputs=other.num_inputs,
        squares=other.squares,
        codes={},
    )
