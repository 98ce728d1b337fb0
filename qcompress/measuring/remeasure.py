"""Measure the same options again around a given choice.

The effect of an option on the loss is most accurate near the model that it was measured on. If a choice changes many
parts substantially, its loss differs from the prediction, and a solver selects exactly those choices for which the
prediction is too optimistic. So the choice is applied to the model, and every option is measured again as a change of
that model, with losses still relative to the original's outputs.
"""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

from numpy.typing import ArrayLike

from formulations.files import AnyPath
from qcompress.compressed.emulation import Emulation
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement, require_measurement
from qcompress.measuring.accumulation import accumulate
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.true_loss import mean_loss
from qcompress.measuring.workers import checked_jobs
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import Loss, LossFunction, as_loss, is_named
from qcompress.model.steady import steady
from qcompress.scalars import as_cache_file


def measured_in_memory(
    calibration: Calibration,
    measurement: Measurement,
    choice: ArrayLike,
    code: str,
    *,
    jobs: int = 1,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Measurement:
    """`qcompress.remeasure` for a model in memory, whose loss and options are known to be supported.

    Args:
        calibration: the model, with everything that measured numbers depend on.
        measurement: same as in `qcompress.remeasure`.
        choice: same as in `qcompress.remeasure`.
        code: digest of the options' code before any of it ran.
        jobs: same as in `measure`.
        cache: same as in `measure`.
        on_progress: same as in `measure`.
    """
    file, processes = as_cache_file(cache), checked_jobs(jobs)
    emulation = Emulation(calibration.model, measurement)
    emulation.put(choice)
    run = steady(calibration.forward, calibration.seed)
    standing_loss = mean_loss(calibration.model, emulation.model, calibration.data, loss=calibration.loss, forward=run)
    return measured_at(calibration, measurement, emulation, standing_loss, code, file, on_progress, processes)


def measured_at(
    calibration: Calibration,
    measurement: Measurement,
    emulation: Emulation,
    standing_loss: float,
    code: str,
    cache: AnyPath | None,
    on_progress: Callable[[MeasureProgress], None] | None,
    jobs: int = 1,
) -> Measurement:
    """Measure the options again as changes of the emulation's model, whose loss is ``standing_loss``.

    The digest ``code`` of the options' code counts in the cache.
    """
    standing, model = tuple(emulation.choice), calibration.model
    candidates = Candidates(emulation.model, measurement.parts, measurement.transforms, emulation.rows, standing)
    settings = [measurement.method, standing, code, None if cache is None else calibration.digests()]
    with forwards.evaluating(model), forwards.evaluating(emulation.model):
        sums = accumulate(
            emulation.model,
            calibration.data,
            candidates,
            calibration.loss,
            measurement.method,
            measurement.seed,
            steady(calibration.forward, measurement.seed),
            settings,
            original=model,
            tried=measurement.tried,
            jobs=jobs,
            cache=cache,
            on_progress=on_progress,
        )
    return dataclasses.replace(
        measurement,
        cost=sums.mean_cost(),
        softened=sums.mean_softened(),
        factor=sums.factor(),
        standard_error=sums.standard_error(),
        num_samples=sums.num_samples,
        tried=MappingProxyType(sums.tried),
        standing=standing,
        standing_loss=standing_loss,
        ran=None,
    )


def require_weights_alone(measurement: Measurement) -> None:
    """Raise an error for options that cannot be measured around a choice: inputs that are rounded, removed channels.

    Raises:
        OptionsError: an option rounds activations, or removes channels.
    """
    if measurement.sets:
        raise OptionsError(
            "channels cannot be measured around a choice: rounds= of compress() measures again between removals, as "
            "measure(smaller, ..., original=model) does"
        )
    for part, options in zip(measurement.parts, measurement.transforms, strict=True):
        if label := next((option.label for option in options if option.activations is not None), ""):
            raise OptionsError(
                f"options that round activations cannot be measured around a choice: {part.name!r} has {label!r}; "
                "leave integer_products() out, or do not refine"
            )


def loss_of(measurement: Measurement, loss: str | LossFunction | Loss | None) -> Loss:
    """Return the loss that the measurement was made with.

    Raises:
        OptionsError: it is a callable that was not given, or a different loss was given.
    """
    require_measurement(measurement)
    if loss is None and not is_named(measurement.loss):
        raise OptionsError(f"the measurement was made with the loss {measurement.loss!r}: pass that callable as loss=")
    asked = as_loss(measurement.loss if loss is None else loss)
    if asked.name != measurement.loss:
        raise OptionsError(f"the measurement was made with the loss {measurement.loss!r}, found {asked.name!r}")
    return asked
