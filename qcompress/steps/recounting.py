"""Count the bytes and multiply-accumulates of a network with removed channels.

They were predicted from one trace of the network before the removal. What a network multiplies may depend on its
values, and a trace may miss something. So the report states the counts, and warns if they differ from the prediction.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn

from formulations.formatting import amount
from qcompress.compressed.file import compressed_size
from qcompress.compressed.record import record_of
from qcompress.measurement import Measurement
from qcompress.model.counting import count
from qcompress.model.steady import steady
from qcompress.steps.request import Request
from qcompress.structure.coded import MAX_ROUNDING, num_matrices

SAME = 1e-6
"""Relative difference up to which counts are the same: sums of floats."""


def recount(
    request: Request, measurement: Measurement, smaller: nn.Module, usage: Mapping[str, float]
) -> dict[str, float]:
    """Return the bytes and macs of ``smaller`` where they differ from the predicted ``usage``.

    One batch is run. If its macs are not the predicted ones, all batches are run through the original and ``smaller``.
    """
    found = {
        "bytes": float(compressed_size(smaller).payload_bytes),
        "macs": _macs(request, measurement, smaller, usage["macs"]),
    }
    return {name: taken for name, taken in found.items() if not np.isclose(taken, usage[name], rtol=SAME, atol=0)}


def _macs(request: Request, measurement: Measurement, smaller: nn.Module, predicted: float) -> float:
    calibration = request.calibration
    run = steady(calibration.forward, calibration.seed)
    taken = count(smaller, [calibration.first_batch()], run).macs
    if np.isclose(taken, predicted, rtol=SAME, atol=0):
        return taken
    before, after = (count(model, calibration.data, run).macs for model in (request.copied, smaller))
    return measurement.original["macs"] * after / before if before else after  # a given measurement has its own data


def recount_warnings(
    smaller: nn.Module, taken: Mapping[str, float], usage: Mapping[str, float], budgets: Mapping[str, float]
) -> Iterator[str]:
    """Yield a warning for every resource that was not predicted correctly.

    Bytes may be fewer by what was reserved for rounding codes to whole bytes.
    """
    parts = () if (record := record_of(smaller)) is None else record.parts
    reserved = 2 * MAX_ROUNDING * sum(num_matrices(item.transform, item.part.target) for item in parts)
    for name, use in taken.items():
        if name == "bytes" and 0 <= usage[name] - use <= reserved:
            continue
        over = f", more than its budget of {amount(budgets[name])}" if use > budgets.get(name, np.inf) else ""
        yield (
            f"the smaller network takes {amount(use)} {name}{over}; predicted from a trace of the network before were "
            f"{amount(usage[name])}"
        )
