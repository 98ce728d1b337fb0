"""`measure` for an opened model: block by block under a memory limit, resumable after every block.

This is ``method="sampled"`` (`qcompress.measuring.methods.weight_gradients`), with the same numbers; the effects are
computed block by block (`qcompress.measuring.streamed.effects`), and then the options that are worth running
(`qcompress.measuring.streamed.alone`): all blocks are read three times.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from formulations.files import AnyPath
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates, EncodeProgress, fitted
from qcompress.measuring.memory import HELD
from qcompress.measuring.methods.reruns import NOT_IN_FLOAT32, options_to_run, with_runs
from qcompress.measuring.options_by_layer import Offered, calibrated_options
from qcompress.measuring.progress import MeasureProgress, block_progress
from qcompress.measuring.streamed.alone import RunsByBlock
from qcompress.measuring.streamed.effects import (
    StreamedEffects,
    UnitEffects,
    effects_of_parts,
    probes,
    unknown_parts,
)
from qcompress.measuring.streamed.encoding_progress import EncodingOfBlocks
from qcompress.measuring.streamed.forecast import as_bytes, resident_bytes, room_left
from qcompress.measuring.streamed.forecast_memory import surveyed, unit_forecasts
from qcompress.measuring.streamed.inputs import inputs_of
from qcompress.measuring.streamed.resume_folder import resume_folder
from qcompress.measuring.streamed.supported import require_supported
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.measuring.sums import Sums, probe_generator
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.chain import without_cache
from qcompress.model.losses import CallableLoss, Loss
from qcompress.model.opened import opened_of
from qcompress.model.parts import Part, Survey
from qcompress.model.steady import steady
from qcompress.model.weights import layer_names
from qcompress.transforms.base import Transform


def measure_streamed(
    calibration: Calibration,
    offered: Offered,
    *,
    cache: AnyPath | None = None,
    memory: int | str | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
) -> Measurement:
    """`qcompress.measure` for an opened model, with the same arguments.

    Raises:
        OptionsError: the gradient of the loss at the original is not zero, options round activations, or there is too
            little memory.
    """
    model, limit = calibration.model, as_bytes(memory)
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    if isinstance(calibration.loss, CallableLoss):
        raise OptionsError(f"an opened model is measured with loss 'kl' or 'mse', found {calibration.loss.name!r}")
    offered.require_known(layer_names(model))
    key = _key(calibration, offered)
    with (
        resume_folder(cache, key) as folder,
        forwards.evaluating(model),
        forwards.layer_by_layer(),
        without_cache(model),
    ):
        run = steady(calibration.forward, calibration.seed)
        sweep = BlockSweep(model, opened, calibration.data, run, folder)
        inventory, output = surveyed(sweep, run, offered, calibration.loss)
        options, notes = calibrated_options(inventory.parts, offered)
        require_supported(inventory.parts, [options[part.name].offers for part in inventory.parts])
        units_needed = [] if limit is None else unit_forecasts(sweep, inventory.parts, options, output, limit)
        room = room_left(limit, resident_bytes(), units_needed, HELD)

        encoding = None if on_encode is None else EncodingOfBlocks(inventory.parts, on_encode)

        def work_out(parts: Sequence[Part], block: int | None) -> tuple[Candidates, NDArray[np.float64]]:
            offers = {part.name: options[part.name].offers for part in parts}
            inputs = inputs_of(model, sweep, block, parts, offers)
            candidates, errors = fitted(model, tuple(parts), options, *inputs, encoding, decoded_bytes=0)
            return candidates, errors

        probe = probes(sweep, calibration.loss, partial(probe_generator, calibration.seed))
        effects = StreamedEffects(sweep, inventory.parts, work_out, [probe], room, check=True)
        tell = block_progress(on_progress, num_samples=len(sweep), total=3 * len(sweep.chain) + 2)
        for index in sweep.forward():
            tell(index + 1)
        sweep.require_chain(output)
        units = []
        for number, unit in enumerate(effects.units()):
            units.append(unit)
            if encoding is not None:
                encoding.skip(unit.parts)
            tell(len(sweep.chain) + number + 1)
        measurement = _assembled(calibration, inventory, units, sweep, notes)
        return _with_runs(measurement, sweep, calibration.loss, lambda done: tell(2 * len(sweep.chain) + 2 + done))


def _with_runs(measurement: Measurement, sweep: BlockSweep, loss: Loss, tell: Callable[[int], None]) -> Measurement:
    """Return the measurement with the costs of the options that are worth running, see `reruns`."""
    runs = options_to_run(measurement, len(sweep))
    if not runs:
        return measurement
    options = [
        (part, transform)
        for part, transforms in zip(measurement.parts, measurement.transforms, strict=True)
        for transform in transforms
    ]
    found = RunsByBlock(sweep, [options[run] for run in runs], loss).rises(tell)
    if found is None:
        return replace(measurement, notes=(*measurement.notes, NOT_IN_FLOAT32))
    return with_runs(measurement, len(sweep), runs, *found)


def _key(calibration: Calibration, offered: Offered) -> str:
    """Return the digest of the settings that the files of an interrupted measurement belong to."""
    settings = {**calibration.digests(), "options": offered.to_json(), "code": offered.code().digest}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _assembled(
    calibration: Calibration,
    inventory: Survey,
    units: Sequence[UnitEffects],
    sweep: BlockSweep,
    notes: list[str],
) -> Measurement:
    """Assemble the measurement from the units' effects."""
    by_part: dict[str, tuple[tuple[Transform, ...], NDArray[np.float64]]] = {}
    for unit in units:
        by_part |= zip(unit.parts, zip(unit.transforms, unit.split(unit.errors), strict=True), strict=True)
    effects, unknown, names = effects_of_parts(units), unknown_parts(units), [part.name for part in inventory.parts]
    last = {name: 1 if name in unknown else None for name in names}
    transforms = tuple(by_part[name][0][: last[name]] for name in names)
    rows = np.concatenate([effects[name][: last[name]] for name in names])
    sums = Sums(len(rows), calibration.seed, by_sample=True)
    half_squares = 0.5 * rows**2
    sums.add(half_squares.sum(axis=1), [rows], sum(sweep.sizes), cost_squares=np.square(half_squares).sum(axis=1))
    targets = [
        (part.target, transform) for part, each in zip(inventory.parts, transforms, strict=True) for transform in each
    ]
    return Measurement(
        parts=inventory.parts,
        transforms=transforms,
        cost=sums.mean_cost(),
        factor=sums.factor(),
        error=np.concatenate([by_part[name][1][: last[name]] for name in names]),
        resources=MappingProxyType(
            {
                "bytes": np.array([transform.size_bytes(target) for target, transform in targets], dtype=np.float64),
                "macs": np.array([transform.macs(target) for target, transform in targets], dtype=np.float64),
            }
        ),
        fixed=MappingProxyType(inventory.fixed),
        original=MappingProxyType(inventory.original),
        skipped=inventory.skipped,
        selecting=inventory.selecting,
        num_samples=sums.num_samples,
        method="sampled",
        loss=calibration.loss.name,
        seed=calibration.seed,
        model_fingerprint=Measurement.fingerprint_of(calibration.model),
        standing=(0,) * len(names),
        notes=tuple(notes),
        no_choice=MappingProxyType(unknown),
        standard_error=sums.standard_error(),
    )
