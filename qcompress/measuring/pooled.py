"""Extend a measurement by further samples, with the options encoded as before.

Costs and pair terms are means over samples, so further samples are measured separately and averaged in, weighted by
their number. If codes were fitted to the first samples, the further ones reveal how far they overfit.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.compressed.emulation import Emulation
from qcompress.measurement import Measurement
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.remeasure import measured_at
from qcompress.model.calibration import Calibration


def with_more_samples(
    calibration: Calibration,
    measurement: Measurement,
    *,
    jobs: int = 1,
    cache: Path | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Measurement:
    """Return the measurement averaged over the samples of ``calibration`` as well.

    Args:
        calibration: the measured model with batches that were not measured.
        measurement: the result of `measure`; its options keep their codes, and its moments stay the same.
        jobs: same as in `measure`.
        cache: file for the sums so far, from which an interrupted call resumes, whatever the code; deleted at the end.
        on_progress: same as in `measure`.
    """
    emulation = Emulation(calibration.model, measurement)
    more = measured_at(calibration, measurement, emulation, 0.0, "", cache, on_progress, jobs)
    if cache is not None:
        cache.unlink(missing_ok=True)
    return pooled(measurement, more)


def without_moments(measurement: Measurement) -> Measurement:
    """Return the measurement without statistics of inputs and codes, the bulk of it."""
    empty: MappingProxyType[str, Any] = MappingProxyType({})
    return replace(measurement, moments=empty, num_inputs=empty, squares=empty, codes={})


def with_costs_of(measurement: Measurement, other: Measurement) -> Measurement:
    """Return the measurement with the costs and pair terms of another one of the same options."""
    return replace(
        measurement,
        cost=other.cost,
        softened=other.softened,
        standard_error=other.standard_error,
        factor=other.factor,
        num_samples=other.num_samples,
        ran=other.ran,
    )


def pooled(measurement: Measurement, more: Measurement) -> Measurement:
    """Return ``measurement`` with the means of two measurements of the same options over different samples.

    Options that only ``measurement`` ran alone keep its costs: the other one's are estimates.
    """
    num_samples = measurement.num_samples + more.num_samples
    share = measurement.num_samples / num_samples

    def known(own: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64]:
        return mean if measurement.ran is None else np.where(measurement.ran, own, mean)

    def softened() -> NDArray[np.float64] | None:
        if measurement.softened is None or more.softened is None:
            return None
        return share * measurement.softened + (1 - share) * more.softened

    def standard_error() -> NDArray[np.float64] | None:
        if measurement.standard_error is None or more.standard_error is None:
            return None
        both = np.hypot(share * measurement.standard_error, (1 - share) * more.standard_error)
        return known(measurement.standard_error, both)

    return replace(
        measurement,
        cost=known(measurement.cost, share * measurement.cost + (1 - share) * more.cost),
        softened=softened(),
        standard_error=standard_error(),
        factor=np.hstack([share**0.5 * measurement.factor, (1 - share) ** 0.5 * more.factor]),
        num_samples=num_samples,
    )
