"""The last step: the true losses of what came out, warnings, and the report."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from formulations import Problem
from formulations.files import replacing
from qcompress import cautions
from qcompress.agreement import agreement
from qcompress.budgets import FILE_BYTES, LATENCY
from qcompress.compressed.file import compressed_size
from qcompress.compressed.record import record_of
from qcompress.guard import Guarded
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import mean_loss
from qcompress.refinement import Refined
from qcompress.report import PartReport, Report
from qcompress.run_folder import RunFolder
from qcompress.scalars import as_number
from qcompress.steps.request import Request
from solvers import Solution
from solvers.smallest_use import SmallestUse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What the steps before the report gave.

    Attributes:
        smallest: the smallest use that was found, where a resource is minimized.
        refined: what measuring again around the choice brought, where rounds were asked for.
        guarded: the candidates tried on the held-out samples, where there are any.
        fitted: the measurement whose moments the codes and factors were fitted to in the end.
        chosen: the compressed model before fine-tuning.
        smaller: the compressed model.
        latency_measured_s: seconds of ``smaller`` in the engine, where it was timed.
    """

    measurement: Measurement
    problem: Problem
    solution: Solution
    smallest: SmallestUse | None
    refined: Refined | None
    guarded: Guarded | None
    fitted: Measurement
    chosen: nn.Module
    smaller: nn.Module
    latency_measured_s: float | None

    @property
    def refitted(self) -> bool:
        """Whether codes and factors were fitted again after the choice, to all the data."""
        return self.fitted is not self.measurement

    @property
    def tuned(self) -> bool:
        """Whether the model was fine-tuned."""
        return self.smaller is not self.chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """True losses and the caller's metric; see `Report`."""

    measured: float
    validation: float | None
    finetuned: float | None
    metric_before: float | None
    metric_after: float | None


def reported(request: Request, run: RunFolder, outcome: Outcome) -> Report:
    """The figures of the run, with true losses taken here, as JSON and for people in the folder."""
    measurement, problem, solution, guarded = outcome.measurement, outcome.problem, outcome.solution, outcome.guarded
    with run.timed("check"):
        checked = _checked(request, outcome)
    assert solution.objective is not None  # noqa: S101
    report = Report(
        loss=measurement.loss,
        loss_predicted=solution.objective,
        loss_measured=checked.measured,
        loss_validation=checked.validation,
        loss_finetuned=checked.finetuned,
        latency_measured_s=outcome.latency_measured_s,
        refitted=outcome.refitted,
        bound=solution.bound,
        gap=solution.gap,
        status=str(solution.status),
        solver=solution.solver,
        wall_s=run.wall_s,
        usage=_usage(request, outcome),
        original=dict(measurement.original),
        budgets=dict(problem.budgets),
        metric_before=checked.metric_before,
        metric_after=checked.metric_after,
        parts=tuple(_part_reports(outcome)),
        skipped={item.name: item.reason for item in measurement.skipped},
        skipped_bytes={item.name: item.size_bytes for item in measurement.skipped},
        refined=None if outcome.refined is None else outcome.refined.to_json(),
        smallest=None if outcome.smallest is None else outcome.smallest.to_json(),
        candidates=() if guarded is None else guarded.candidates,
        undecided=() if guarded is None else guarded.undecided,
        chosen=None if guarded is None else guarded.best.name,
        warnings=tuple(_warnings(request, outcome, checked.validation)),
    )
    if run.path is not None:
        report.save(run.path / "report.json")
        calibration, data = request.calibration, list(request.kept) or request.data
        if measurement.loss == "kl" and isinstance(
            calibration.model, nn.Module
        ):  # scores of classes, in the last dimension
            agreement(calibration.model, outcome.smaller, data, forward=calibration.forward).save(
                run.path / "agreement.json"
            )
        with replacing(run.path / "summary.md") as file:
            file.write(report.to_markdown().encode())
    return report


def _checked(request: Request, outcome: Outcome) -> _Checked:
    """The losses of the models that came out.

    Once codes were fitted to the held-out samples too, the loss on these is the guard's, from before.
    """
    calibration, evaluate, kept = request.calibration, request.evaluate, list(request.kept)

    def loss_of(model: nn.Module, data: Iterable[Any]) -> float:
        return mean_loss(calibration.model, model, data, loss=calibration.loss, forward=calibration.forward)

    if outcome.refitted and outcome.guarded is not None:
        validation: float | None = outcome.guarded.won.loss_validation
    else:
        validation = loss_of(outcome.smaller, kept) if kept else None
    return _Checked(
        measured=loss_of(outcome.chosen, request.data),
        validation=validation,
        finetuned=loss_of(outcome.smaller, request.data) if outcome.tuned else None,
        metric_before=None if evaluate is None else _metric(evaluate(calibration.model)),
        metric_after=None if evaluate is None else _metric(evaluate(outcome.smaller)),
    )


def _metric(value: Any) -> float:
    """What ``evaluate`` returned, as a number.

    Raises:
        OptionsError: it is not a number.
    """
    return as_number(value, "what evaluate(model) returns", above=-math.inf, wanted="a finite number")


def _usage(request: Request, outcome: Outcome) -> dict[str, float]:
    """The use of every resource; of our own file, for which room was left, the size that it really has."""
    usage = outcome.solution.usage
    if FILE_BYTES not in usage or request.engine is not None:
        return usage
    return {**usage, FILE_BYTES: float(compressed_size(outcome.smaller).file_bytes)}


def _warnings(request: Request, outcome: Outcome, loss_validation: float | None) -> Iterator[str]:
    """Where the figures may not hold."""
    measurement, solution = outcome.measurement, outcome.solution
    if loss_validation is not None and not outcome.tuned:
        assert solution.objective is not None  # noqa: S101
        yield from cautions.of_prediction(measurement.loss, solution.objective, loss_validation)
    yield from cautions.of_split(request.split, given=request.measurement is not None)
    yield from cautions.of_inputs(measurement, solution, outcome.fitted)
    yield from cautions.of_latency(outcome.problem.budgets.get(LATENCY), outcome.latency_measured_s)


def _part_reports(outcome: Outcome) -> Iterator[PartReport]:
    """Every part as it is stored in the end: what was trained is rounded to nearest, whatever was chosen."""
    measurement, problem, choice = outcome.measurement, outcome.problem, outcome.solution.choice
    assert choice is not None  # noqa: S101
    record, chosen = record_of(outcome.smaller), problem.flat(choice)
    transforms = [options[option] for options, option in zip(measurement.transforms, choice.tolist(), strict=True)]
    stored = transforms if record is None or record.cuts else [item.transform for item in record.parts]
    before, after = (bytes_of_parts(problem, flat) for flat in (problem.group_offsets[:-1], chosen))
    for index, (part, transform) in enumerate(zip(measurement.parts, stored, strict=True)):
        yield PartReport(
            name=part.name,
            option=transform.label,
            bytes_before=float(before[index] if measurement.sets else part.target.dense_bytes),
            bytes_after=float(after[index]),
            loss_alone=float(problem.cost[chosen[index]]),
        )


def bytes_of_parts(problem: Problem, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """``(G,)`` bytes of the flat options ``chosen``; what two parts take together counts half for each."""
    used = problem.resources["bytes"][chosen]
    if (terms := problem.resource_pairs.get("bytes")) is None:
        return used
    x = np.zeros(problem.num_options)
    x[chosen] = 1.0
    return np.asarray(used + 0.5 * (terms @ x + terms.T @ x)[chosen])
