"""From a choice to the result: applied, fine-tuned, reported."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from formulations import Problem
from formulations.files import replacing
from qcompress import cautions
from qcompress.budgets import FILE_BYTES, LATENCY
from qcompress.compressed.apply import apply, chosen_transforms
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import compressed_size, load_compressed, save_compressed
from qcompress.compressed.record import record_of
from qcompress.guard import Guarded
from qcompress.identity import identify, identify_batches
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import mean_loss
from qcompress.refinement import Refined
from qcompress.report import Report, make_report
from qcompress.run_folder import Kept, RunFolder
from qcompress.scalars import as_number
from qcompress.steps.request import KEPT, MODEL_FILE, Request
from qcompress.training.finetune import finetune
from solvers import Solution
from solvers.smallest_use import SmallestUse


def applied(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, *, refitted: bool = False
) -> nn.Module:
    """The compressed copy of the model, before any training."""
    own, file = request.calibration, MODEL_FILE if request.finetune_steps == 0 else "chosen.safetensors"
    return run.once(
        "apply",
        lambda _: apply(
            request.copied, measurement, solution, batch_norm_data=request.batch_norm_data, forward=own.forward
        ),
        key=_applied_from(request, run, measurement, solution, refitted=refitted),
        kept=_kept_model(file, request.copied),
    )


def finetuned(request: Request, run: RunFolder, chosen: nn.Module) -> nn.Module:
    """The compressed model after fine-tuning with the original as teacher, where steps are asked for."""
    if request.finetune_steps == 0:
        return chosen
    own = request.calibration
    training = {"steps": request.finetune_steps, "learning_rate": request.learning_rate}
    return run.once(
        "finetune",
        lambda cache: finetune(
            chosen,
            own.data,
            request.finetune_steps,
            teacher=own.model,
            loss=own.loss,
            learning_rate=request.learning_rate,
            validation=own.data,
            forward=own.forward,
            seed=own.seed,
            cache=cache,
            on_progress=run.watched(request.on_finetune),
        ),
        key={"chosen": chosen, **request.identities, **training},
        kept=_kept_model(MODEL_FILE, request.copied),
    )


def reported(
    request: Request,
    run: RunFolder,
    measurement: Measurement,
    problem: Problem,
    solution: Solution,
    *,
    better: Refined | None,
    best: Guarded | None,
    chosen: nn.Module,
    smaller: nn.Module,
    smallest: SmallestUse | None,
    fitted: Measurement,
    latency_measured_s: float | None = None,
) -> Report:
    """The figures of the run, with true losses taken here, as JSON and for people in the folder.

    Once ``fitted`` has seen the samples kept aside, the loss on them is the guard's, from before.
    """
    again = fitted is not measurement
    own, evaluate, kept = request.calibration, request.evaluate, list(request.kept)

    def lost(model: nn.Module, data: Iterable[Any]) -> float:
        return mean_loss(own.model, model, data, loss=own.loss, forward=own.forward)

    with run.timed("check"):
        loss_measured = lost(chosen, request.data)
        loss_finetuned = None if smaller is chosen else lost(smaller, request.data)
        if again and best is not None:
            loss_validation: float | None = best.won.loss_validation
        else:
            loss_validation = lost(smaller, kept) if kept else None
        before, after = (None, None) if evaluate is None else map(_metric, (evaluate(own.model), evaluate(smaller)))
    record = record_of(smaller)
    assert solution.objective is not None  # noqa: S101
    warnings: list[str] = []
    if loss_validation is not None and smaller is chosen:
        warnings += cautions.of_prediction(measurement.loss, solution.objective, loss_validation)
    warnings += cautions.of_split(request.split, given=request.measurement is not None)
    warnings += cautions.of_inputs(measurement, solution, fitted)
    warnings += cautions.of_latency(problem.budgets.get(LATENCY), latency_measured_s)
    report = make_report(
        measurement,
        problem,
        solution,
        loss_measured=loss_measured,
        loss_validation=loss_validation,
        refitted=again,
        loss_finetuned=loss_finetuned,
        latency_measured_s=latency_measured_s,
        refined=better,
        smallest=smallest,
        guarded=best,
        warnings=warnings,
        wall_s=run.wall_s,
        metric_before=before,
        metric_after=after,
        stored=None if record is None or record.cuts else [item.transform for item in record.parts],
    )
    if FILE_BYTES in report.usage and request.engine is None:  # room was left for it: what it really is
        size = float(compressed_size(smaller).file_bytes)
        report = replace(report, usage={**report.usage, FILE_BYTES: size})
    _keep(report, run)
    return report


def _keep(report: Report, run: RunFolder) -> None:
    """Write the report into the run's folder, as JSON and for people."""
    if run.path is not None:
        report.save(run.path / "report.json")
        with replacing(run.path / "summary.md") as file:
            file.write(report.to_markdown().encode())


def _metric(value: Any) -> float:
    """What ``evaluate`` gave, as a number.

    Raises:
        OptionsError: it is none.
    """
    return as_number(value, "what evaluate(model) returns", above=-math.inf, wanted="a finite number")


def _applied_from(
    request: Request, run: RunFolder, measurement: Measurement, solution: Solution, *, refitted: bool
) -> dict[str, Any]:
    """What the compressed model depends on; refitted, on the samples kept aside as well."""
    if run.path is None:
        return {}
    batches, chosen = request.batch_norm_data, chosen_transforms(request.copied, measurement, solution)
    statistics = identify(None) if batches is None else identify_batches(batches, "batch_norm_data")
    return {
        **request.measured_from(),
        **({KEPT: request.identities[KEPT]} if refitted else {}),
        "forward": request.identities["forward"],
        "transforms": [transform.to_json() for transform in chosen],
        "batch_norm_data": statistics,
    }


def _kept_model(file: str, original: nn.Module) -> Kept[nn.Module]:
    return Kept(
        file,
        save_compressed,
        lambda path: _in_mode_of(original, load_compressed(path, partial(own_copy, original))),
    )


def _in_mode_of(original: nn.Module, model: nn.Module) -> nn.Module:
    """``model`` in training or evaluation mode, module by module as the original."""
    model.train(original.training)
    modes = {path: module.training for path, module in original.named_modules()}
    for path, module in model.named_modules():
        if path in modes:
            module.training = modes[path]
        elif path.rpartition(".")[0] in modes:  # a factor in the place of a layer
            module.training = modes[path.rpartition(".")[0]]
    return model
