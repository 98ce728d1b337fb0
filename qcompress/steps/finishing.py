"""Steps from a choice to the compressed model: apply, fit in turn, and fine-tune."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qcompress.compressed.apply import apply, chosen_transforms
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import load_compressed, save_compressed
from qcompress.compressed.record import record_of
from qcompress.errors import NotFiniteError
from qcompress.measurement import Measurement
from qcompress.measuring.options_by_layer import says_left_out
from qcompress.measuring.recoded import fitted_in_turn
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.opened import opened_of
from qcompress.model.sites import path_of
from qcompress.run_folder import Kept, RunFolder
from qcompress.steps import opened
from qcompress.steps.request import KEPT, MODEL_FILE, Request, identity_of
from qcompress.training.finetune import finetune
from solvers import Solution


def apply_choice(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, *, refitted: bool = False
) -> nn.Module:
    """Return the compressed copy of the model before any training."""
    calibration, last = request.calibration, request.finetune_steps == 0 and not measurement.sets
    file = MODEL_FILE if last else "chosen.safetensors"
    if opened_of(calibration.model) is not None:
        key = _applied_from(request, run, measurement, solution, refitted=refitted)
        return opened.apply_choice(request, run, measurement, solution, key)
    return run.once(
        "apply",
        lambda _: apply(
            request.copied, measurement, solution, batch_norm_data=request.batch_norm_data, forward=calibration.forward
        ),
        key=_applied_from(request, run, measurement, solution, refitted=refitted),
        kept=_kept_model(file, request.copied),
    )


def fit_in_turn(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, chosen: nn.Module
) -> nn.Module:
    """Refit the layers of a network with removed channels in turn, if this lowers the held-out loss.

    Codes are then fitted again. Without held-out samples, the loss on the calibration data decides. Models without
    removed channels are returned unchanged.
    """
    if not measurement.sets:
        return chosen
    calibration, judged = request.calibration, list(request.kept) or request.calibration.data

    def make(_: Path | None) -> nn.Module:
        record = record_of(chosen)
        if record is None or not record.smaller:
            return chosen
        left_out, cut = _left_out(request, measurement), _cut(chosen)
        others = [path for path, _ in chosen.named_modules() if path not in cut and left_out(path)]
        measured = partial(mean_loss, calibration.goal, loss=calibration.loss, forward=calibration.forward)
        before = measured(chosen, judged)
        try:
            fitted = fitted_in_turn(
                request.copied,
                measurement,
                chosen_transforms(request.copied, measurement, solution),
                calibration.data,
                original=calibration.goal,
                unchanged=others,
                forward=calibration.forward,
                seed=calibration.seed,
            )
            lower = measured(fitted, judged) < before
            return fitted if lower and math.isfinite(measured(fitted, calibration.data)) else chosen
        except NotFiniteError:  # the fit has outputs that are not finite; the choice may have none
            return chosen

    return run.once(
        "fit",
        make,
        key={**_applied_from(request, run, measurement, solution, refitted=True), "chosen": chosen},
        kept=_kept_model(MODEL_FILE if request.finetune_steps == 0 else "fitted.safetensors", request.copied),
    )


def finetune_model(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, chosen: nn.Module
) -> nn.Module:
    """Fine-tune the compressed model with the original as teacher, if steps are requested.

    The best step is selected on the held-out samples if there are any, otherwise on the calibration data. Layers that
    are left out (see `qcompress.measuring.options_by_layer`) stay as they are, unless they lost inputs. A given
    measurement lists only layers with a matrix, and none if channels were on offer.
    """
    if request.finetune_steps == 0:
        return chosen
    calibration = request.calibration
    training = {
        "steps": request.finetune_steps,
        "learning_rate": request.learning_rate,
        "trained": [parameter.requires_grad for parameter in chosen.parameters()],
    }

    def make(cache: Path | None) -> nn.Module:
        staying = _parameters_left_out(chosen, _left_out(request, measurement))
        _require_gradient(chosen, staying, required=False)
        try:
            tuned = finetune(
                chosen,
                calibration.data,
                request.finetune_steps,
                teacher=calibration.goal,
                loss=calibration.loss,
                learning_rate=request.learning_rate,
                validation=list(request.kept) or calibration.data,
                forward=calibration.forward,
                seed=calibration.seed,
                cache=cache,
                on_progress=run.watched(request.on_finetune),
            )
        finally:
            _require_gradient(chosen, staying, required=True)
        _require_gradient(tuned, staying, required=True)
        return tuned

    return run.once(
        "finetune",
        make,
        key={**_applied_from(request, run, measurement, solution, refitted=True), "chosen": chosen, **training},
        kept=_kept_model(MODEL_FILE, request.copied),
    )


def _left_out(request: Request, measurement: Measurement) -> Callable[..., bool]:
    """Return the function of a layer's names that says whether it is known to be left out; see `finetune_model`."""
    if request.measurement is None:
        return lambda *names: bool(request.offered.left_out(*names))
    named = {item.name for item in measurement.skipped if says_left_out(item.reason) and not measurement.sets}
    return lambda *names: not named.isdisjoint(names)


def _cut(chosen: nn.Module) -> set[str]:
    """Return the paths of the layers that lost channels."""
    record = record_of(chosen)
    return set() if record is None else {name.rpartition(".")[0] for name, _ in record.cuts}


def _parameters_left_out(chosen: nn.Module, left_out: Callable[..., bool]) -> list[str]:
    """Return the names of trainable parameters that stay unchanged; those of compressed layers do not."""
    record, cut = record_of(chosen), _cut(chosen)
    compressed = () if record is None else tuple(f"{path}." for item in record.parts for path in item.part.modules)
    names: dict[nn.Parameter, list[str]] = {}
    for path, module in chosen.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(parameter, []).extend((path, path_of(path, name)))
    return [
        name
        for name, parameter in chosen.named_parameters()
        if parameter.requires_grad
        and left_out(*names[parameter])
        and not any(own in cut or own.startswith(compressed) for own in names[parameter])
    ]


def _require_gradient(model: nn.Module, names: Iterable[str], *, required: bool) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(required)


def _applied_from(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, *, refitted: bool
) -> dict[str, Any]:
    """Return what the compressed model depends on; after a refit, this includes the held-out samples."""
    if run.path is None:
        return {}
    chosen = chosen_transforms(request.copied, measurement, solution)
    seen = {name: identity for name, identity in request.identities.items() if refitted or name != KEPT}
    return {
        **request.measured_from(),
        **seen,
        "transforms": [transform.to_json() for transform in chosen],
        "batch_norm_data": identity_of(request.batch_norm_data, "batch_norm_data"),
    }


def _kept_model(file: str, original: nn.Module) -> Kept[nn.Module]:
    return Kept(
        file,
        save_compressed,
        lambda path: load_compressed(path, partial(own_copy, original)),
    )
