"""Steps of `compress` that differ for an opened model."""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qcompress.budgets import FILE_BYTES, LATENCY
from qcompress.compressed.apply import chosen_transforms
from qcompress.compressed.chosen_weights import chosen_model
from qcompress.errors import EngineError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.streamed.forecast import as_bytes
from qcompress.measuring.streamed.supported import require_supported
from qcompress.model.batches import samples
from qcompress.model.opened import opened_of
from qcompress.run_folder import CODES, Kept, RunFolder
from qcompress.steps.request import MODEL_FILE, Request
from qcompress.streaming.applying import apply
from qcompress.streaming.around import require_room_around
from qcompress.streaming.encoding import need_inputs
from solvers import Solution


def require_supported_steps(request: Request) -> None:
    """Check that an opened model supports all requested steps, and that ``memory`` is given only for an opened model.

    Raises:
        OptionsError, EngineError: a step or setting is not supported.
    """
    if opened_of(request.calibration.model) is None:
        if request.memory is not None:
            raise OptionsError("memory= is for models that are read block by block: give qcompress.open_model(folder)")
        return
    limit = as_bytes(request.memory)
    refused = {
        "finetune_steps": request.finetune_steps != 0,
        "batch_norm_data": request.batch_norm_data is not None,
        f"a budget for {LATENCY}": LATENCY in request.budget,
        f"a budget for {FILE_BYTES} without a target": FILE_BYTES in request.budget and request.engine is None,
    }
    if asked := [name for name, given in refused.items() if given]:
        raise OptionsError(f"{asked[0]} is not supported for an opened model: omit it, or load the model whole")
    if request.engine is not None and not request.engine.by_block:
        raise EngineError(f"engine {request.engine.name!r} does not write a model block by block: load it whole")
    if request.measurement is not None:
        require_supported(request.measurement.parts, request.measurement.transforms)
    elif request.method != "sampled":
        raise OptionsError(f"an opened model is measured by method='sampled', found {request.method!r}")
    elif request.refine_rounds and limit is not None:
        require_room_around(request.calibration, request.calibration.data, request.offered, limit)


def first_of(model: nn.Module, batch: Any) -> Any:
    """Return the part of a batch for a trial run: the first sample for an opened model, otherwise all of it."""
    return batch if opened_of(model) is None else next(samples(batch))


def refit_moments(request: Request, measurement: Measurement, solution: Solution) -> Measurement:
    """Return the measurement, as a new object if `apply_choice` refits the choice to all the data."""
    chosen = chosen_transforms(request.calibration.model, measurement, solution)
    fitted = need_inputs(measurement, {part: (transform,) for part, transform in enumerate(chosen)})
    return replace(measurement) if fitted and request.split.kept else measurement


def apply_choice(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, key: dict[str, Any]
) -> nn.Module:
    """Return the model with the codes of the choice, which are written to the run folder block by block."""
    calibration = request.calibration
    data: Iterable[Any] = request.data

    def make(part: Path | None) -> nn.Module:
        return apply(
            calibration.model, measurement, solution, forward=calibration.forward, data=data, folder=part,
            on_encode=run.watched(request.on_encode),
        )  # fmt: skip

    if run.path is None:
        with run.timed("apply"):
            return make(None)

    run.discard(MODEL_FILE)  # of an earlier run of a loaded model
    part = run.path / "apply.part"

    def keep(_: nn.Module, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)

    def again(path: Path) -> nn.Module:
        return chosen_model(
            calibration.model, measurement, chosen_transforms(calibration.model, measurement, solution), path
        )

    run.once("apply", make, key=key, kept=Kept(CODES, keep, again))
    return again(run.path / CODES)
