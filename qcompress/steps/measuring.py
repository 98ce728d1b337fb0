"""Steps around the measurement: copy the model, hold out samples, measure, and refit after the choice."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qcompress.budgets import FILE_BYTES, LATENCY, with_resources
from qcompress.compressed.apply import chosen_transforms
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file_bytes import with_file_bytes
from qcompress.identity import Identity, identify_batches
from qcompress.measurement import Measurement
from qcompress.measuring.latency import load_times, save_times, time_options
from qcompress.measuring.measure import measure
from qcompress.measuring.refit import refit, with_fit_of
from qcompress.measuring.stopwatch import conditions
from qcompress.model.calibration import Calibration
from qcompress.model.forward import first_batch
from qcompress.model.opened import opened_of
from qcompress.model.samples import split_samples
from qcompress.run_folder import Kept, RunFolder
from qcompress.steps import opened
from qcompress.steps.request import KEPT, MEASUREMENT_FILE, REFITTED_FILE, Request
from solvers import Solution


def copy_model(calibration: Calibration) -> nn.Module:
    """Return a copy of the model that shares nothing with it and runs on its own weights.

    Raises:
        ModelError: the model cannot be copied in this way (see `qcompress.compressed.copying`).
    """
    if opened_of(calibration.model) is not None:  # an opened model is never modified
        return calibration.model
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(calibration.seed)
        return own_copy(calibration.model, calibration.first_batch(), calibration.forward)


def hold_out_samples(request: Request, run: RunFolder) -> Request:
    """Hold out samples if the guard needs them and no validation data was given."""
    calibration, split, kept = request.calibration, request.split, request.kept
    if request.guard and kept == ():
        split = split_samples(request.copied, request.data, calibration.forward, calibration.loss)
        kept = split.kept
    calibration = replace(calibration, data=split.calibration)
    identities: dict[str, Identity] = {}
    if run.path is not None:
        identities = {
            **calibration.identities(),
            **request.identities_of_options(),
            KEPT: identify_batches(kept, KEPT),
        }
    return replace(request, calibration=calibration, split=split, kept=kept, identities=identities)


def measure_options(request: Request, run: RunFolder) -> Measurement:
    """Measure every option, including its time if there is a time budget."""
    calibration, tell = request.calibration, run.watched(request.on_measure)

    def make(cache: Path | None) -> Measurement:
        return measure(
            calibration.model,
            calibration.data,
            request.offered.by_pattern,
            skip=request.offered.skip,
            only=request.offered.only,
            method=request.method,
            loss=calibration.loss,
            forward=calibration.forward,
            granularity=request.granularity,
            seed=calibration.seed,
            cache=cache,
            memory=request.memory,
            jobs=request.jobs,
            original=calibration.original,
            on_progress=tell,
            on_encode=run.watched(request.on_encode),
        )

    kept = Kept(MEASUREMENT_FILE, Measurement.save, Measurement.load)
    given = request.measurement
    measurement = run.once(
        "measure", make if given is None else lambda _: given, key=request.measured_from(), kept=kept
    )
    measurement = with_resources(measurement, request.budget)
    if FILE_BYTES in request.budget and request.engine is None:
        measurement = with_file_bytes(request.copied, measurement, more=request.room_bytes, tight=request.tight_room)
    if LATENCY not in request.budget or LATENCY in measurement.resources or request.engine is not None:
        return measurement  # engines do their own timing (see `qcompress.targeting`)
    return run.once(
        "time",
        lambda _: time_options(
            calibration.model,
            measurement,
            first_batch(request.data),
            forward=calibration.forward,
            on_progress=run.watched(request.on_timing),
        ),
        key={**request.measured_from(), **request.identities, **conditions(calibration.model)},
        kept=Kept("latency.npz", save_times, partial(load_times, measurement)),
    )


def refit_moments(request: Request, run: RunFolder, measurement: Measurement, solution: Solution) -> Measurement:
    """Return a measurement with moments over all the data, including the held-out samples, for fitting the choice.

    The measurement is returned unchanged if no samples were held out, if it was given, if the choice fits nothing, or
    before fine-tuning, whose result must be judged on held-out samples.
    """
    calibration = request.calibration
    if opened_of(calibration.model) is not None:
        return opened.refit_moments(request, measurement, solution)
    unseen = not request.split.kept or request.measurement is not None or request.finetune_steps
    if unseen or measurement.sets:  # codes of smaller layers are fitted when they are cut
        return measurement
    chosen = chosen_transforms(request.copied, measurement, solution)
    targets = [part.target for part in measurement.parts]
    if not any(
        item.needs_moments(target) or item.needs_squares(target) for item, target in zip(chosen, targets, strict=True)
    ):
        return measurement
    return run.once(
        "refit",
        lambda _: refit(
            calibration.model, request.data, measurement, forward=calibration.forward, seed=calibration.seed
        ),
        key={**request.measured_from(), **request.identities},
        kept=Kept(REFITTED_FILE, Measurement.save, lambda path: with_fit_of(measurement, Measurement.load(path))),
    )
