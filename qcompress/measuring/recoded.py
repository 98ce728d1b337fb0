"""Smaller networks whose layers are fitted in turn before they are stored as chosen."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from qcompress.compressed.channels import code_, coded_parts_in, codes_of, cut_chosen_
from qcompress.compressed.copying import own_copy
from qcompress.measurement import Measurement
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.layerwise_fit import fit_in_turn_
from qcompress.model import forward as forwards
from qcompress.model.composed import compose_
from qcompress.model.steady import steady
from qcompress.transforms.base import Transform


def fitted_in_turn(
    model: nn.Module,
    measurement: Measurement,
    transforms: Sequence[Transform],
    data: Iterable[Any],
    *,
    original: nn.Module | None = None,
    unchanged: Collection[str] = (),
    forward: forwards.Forward | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of ``model`` with a choice's channels, fitted in turn and then stored with the choice's codes.

    Codes are fitted to the inputs that the layers have in the smaller network.

    Args:
        model: the measured model; it is not modified.
        measurement: measurement with channels on offer.
        transforms: the chosen transform of every part.
        data: re-iterable calibration batches.
        original: the network whose layers' outputs are fitted to; None for ``model``.
        unchanged: paths of layers that are not fitted.
        forward: how to run a batch.
        seed: seed of the random numbers that a pass draws.
    """
    smaller = own_copy(model).eval()
    compose_(smaller)
    cut_chosen_(smaller, measurement, transforms)
    fit_in_turn_(smaller, model if original is None else original, data, forward, unchanged=unchanged)
    if codes := codes_of(measurement, transforms):
        parts = coded_parts_in(smaller, measurement)
        fitting = [part for part in parts if codes[part.name].needs_moments(part.target)]
        run = steady(forward, seed)
        with forwards.evaluating(smaller):
            moments = second_moments(smaller, fitting, data, run)[0] if fitting else {}
        code_(smaller, measurement, codes, moments)
    return smaller
