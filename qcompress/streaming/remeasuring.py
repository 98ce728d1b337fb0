"""`remeasure`: measures options around a choice, of a model in memory or of an opened one, block by block.

For an opened model, the choice is written to a folder as by `apply`, and the samples pass through both the original and
the model with the choice. Backward there are two passes through the latter: one from a drawn label, as in `measure`,
and one from the slope of the loss, as the model with the choice is not at its minimum. Options are encoded from the
original's block, which is in memory beside the other one; their changes are relative to the latter.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from formulations.files import AnyPath
from qcompress.compressed.apply import choice_of, require_measured
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.progress import MeasureProgress, block_progress
from qcompress.measuring.remeasure import loss_of, measured_in_memory, require_weights_alone
from qcompress.measuring.streamed.effects import StreamedEffects, effects_of_parts, probes, unknown_parts
from qcompress.measuring.streamed.forecast import as_bytes
from qcompress.measuring.streamed.resume_folder import resume_folder
from qcompress.measuring.sums import Sums, probe_generator
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import Loss, LossFunction
from qcompress.model.modes import outside_modes, seeding
from qcompress.model.opened import opened_of
from qcompress.streaming.around import Around, around_choice
from qcompress.transforms.own_code import code_of


@outside_modes
def remeasure(
    model: nn.Module,
    data: Iterable[Any],
    measurement: Measurement,
    choice: ArrayLike,
    *,
    loss: str | LossFunction | Loss | None = None,
    forward: forwards.Forward | None = None,
    jobs: int = 1,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    memory: int | str | None = None,
) -> Measurement:
    """Measure the options of a measurement again, as changes of the model with ``choice`` in its weights.

    Args:
        model: the original model; it is not modified.
        data: re-iterable batches.
        measurement: the result of `measure`.
        choice: ``(G,)`` choice of a problem made from the measurement.
        loss: the callable that was used as loss; ``"kl"`` and ``"mse"`` are known from the measurement.
        forward: same as in `measure`.
        jobs: same as in `measure`.
        cache: same as in `measure`.
        on_progress: same as in `measure`.
        memory: same as in `measure`, for an opened model.

    Returns:
        A measurement whose costs are increases from ``standing_loss``, the loss of ``choice``; `formulate` and `apply`
        accept it like any other.

    Raises:
        ModelError: the model is not the measured one, or the choice does not fit it.
        OptionsError: the loss is not the measured one, or options round activations or remove channels; an opened
            model was not measured with ``method="sampled"``, or there is too little memory.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    >>> measurement = measure(model, data, prune_quantize(bits=(2, 4), sparsity=(0,)))
    >>> again = remeasure(model, data, measurement, [1, 2])
    >>> again.standing, again.cost[[1, 5]].tolist()
    ((1, 2), [0.0, 0.0])
    """
    opened = opened_of(model) is not None
    if memory is not None and not opened:
        raise OptionsError("memory= is for models that are read block by block, see open_model()")
    if opened and jobs != 1:
        raise OptionsError(f"an opened model is measured in one process, found jobs={jobs!r}")
    measured = loss_of(measurement, loss)
    require_weights_alone(measurement)
    calibration = Calibration(model=model, data=data, forward=forward, loss=measured, seed=measurement.seed)
    code = code_of(itertools.chain.from_iterable(measurement.transforms)).digest
    common: dict[str, Any] = {"cache": cache, "on_progress": on_progress}
    with seeding(measurement.seed):  # a loader that shuffles gives the same batches when the call is repeated
        if opened:
            return measured_around(calibration, measurement, choice, code, memory=memory, **common)
        return measured_in_memory(calibration, measurement, choice, code, jobs=jobs, **common)


def measured_around(
    calibration: Calibration,
    measurement: Measurement,
    choice: ArrayLike,
    code: str,
    *,
    cache: AnyPath | None = None,
    keep: bool = False,
    memory: int | str | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Measurement:
    """`remeasure` for an opened model, whose loss and options are known to be supported.

    Args:
        calibration: the model, with everything that measured numbers depend on.
        measurement: same as in `remeasure`.
        choice: same as in `remeasure`.
        code: digest of the options' code before any of it ran.
        cache: folder to resume from.
        keep: whether the folder stays when the measurement is complete.
        memory: same as in `remeasure`.
        on_progress: same as in `remeasure`.

    Raises:
        ModelError: the model is not the measured one, or the choice does not fit it.
        OptionsError: it was not measured with ``method="sampled"``, or there is too little memory.
    """
    if measurement.method != "sampled":
        raise OptionsError(f"an opened model is measured by method='sampled', found {measurement.method!r}")
    standing, limit = choice_of(measurement, choice), as_bytes(memory)
    require_measured(calibration.model, measurement.model_fingerprint)
    with (
        resume_folder(cache, _key(calibration, measurement, standing, code), keep=keep) as folder,
        around_choice(calibration, measurement, standing, folder, limit) as around,
    ):
        probe = probes(around.changed, calibration.loss, partial(probe_generator, calibration.seed))
        starts = (probe, around.slope)
        effects = StreamedEffects(around.changed, measurement.parts, around.work_out, starts, around.room, check=True)
        count = len(around.original.chain)
        tell = block_progress(on_progress, num_samples=len(around.original), total=3 * count + 2)
        for passed, sweep in enumerate((around.original, around.changed)):
            for block in sweep.forward():
                tell(passed * count + block + 1)
        units = []
        for number, unit in enumerate(effects.units()):
            units.append(unit)
            tell(2 * count + number + 1)
        found, unknown = effects_of_parts(units), unknown_parts(units)
        return _again(measurement, standing, around, [found[part.name] for part in measurement.parts], unknown)


def _again(
    measurement: Measurement,
    standing: Sequence[int],
    around: Around,
    effects: Sequence[NDArray[np.float64]],
    unknown: dict[str, str],
) -> Measurement:
    """Return the measurement with the costs of changes from the choice.

    The costs of parts whose effects are unknown differ as in the first measurement, without pair terms.
    """
    starts = np.cumsum([0, *map(len, measurement.transforms)])
    by_part = {part.name: slice(*starts[place : place + 2]) for place, part in enumerate(measurement.parts)}
    columns = np.concatenate(effects)
    for name in unknown:
        columns[by_part[name]] = 0.0
    probed, slopes = np.split(columns, 2, axis=1)
    costs = slopes + 0.5 * probed**2
    sums = Sums(len(costs), measurement.seed, by_sample=True)
    sums.add(costs.sum(axis=1), [probed], sum(around.original.sizes), cost_squares=np.square(costs).sum(axis=1))
    cost, error, notes = sums.mean_cost(), sums.standard_error(), []
    if unknown and measurement.standard_error is None:
        error = None
    for place, part in enumerate(measurement.parts):
        if part.name in unknown and len(measurement.transforms[place]) > 1:
            own, here = by_part[part.name], starts[place] + standing[place]
            cost[own] = measurement.cost[own] - measurement.cost[here]
            if error is not None and measurement.standard_error is not None:
                error[own] = measurement.standard_error[own]
                error[here] = 0.0
            notes.append(f"{part.name!r} keeps its differences in cost of before: {unknown[part.name]}")
    return dataclasses.replace(
        measurement,
        cost=cost,
        softened=None,
        factor=sums.factor(),
        standard_error=error,
        num_samples=sums.num_samples,
        standing=tuple(standing),
        standing_loss=around.standing_loss(),
        ran=None,
        notes=(*measurement.notes, *notes),
    )


def _key(calibration: Calibration, measurement: Measurement, standing: Sequence[int], code: str) -> str:
    """Return the digest of the settings that the files of an interrupted measurement belong to."""
    settings = {
        **calibration.digests(),
        "parts": [part.name for part in measurement.parts],
        "options": [[transform.to_json() for transform in own] for own in measurement.transforms],
        "code": code,
        "standing": list(standing),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
