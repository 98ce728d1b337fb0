"""The last step: true losses of the result, warnings, and the report."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from formulations import Problem
from formulations.files import replacing
from qcompress import cautions
from qcompress.agreement import agreement
from qcompress.budgets import FILE_BYTES, LATENCY, loose
from qcompress.compressed.container import require_tensors
from qcompress.compressed.file import compressed_size
from qcompress.compressed.file_bytes import with_file_bytes
from qcompress.compressed.record import record_of
from qcompress.errors import ArtefactError, ResultNotFiniteError
from qcompress.formulation import prediction_error
from qcompress.guard import Guarded
from qcompress.measurement import Measurement, has_choice
from qcompress.measuring.true_loss import sample_losses, standard_error
from qcompress.model import forward as forwards
from qcompress.model.loose import constants_read
from qcompress.model.losses import as_loss
from qcompress.model.opened import opened_of
from qcompress.model.steady import steady
from qcompress.proposals import Proposal
from qcompress.refinement import Refined
from qcompress.report import PartReport, Report
from qcompress.run_folder import RunFolder
from qcompress.steps.metric import metric_of
from qcompress.steps.recounting import recount, recount_warnings
from qcompress.steps.request import Request
from solvers import Solution
from solvers.smallest_use import SmallestUse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """Results of the steps before the report.

    Attributes:
        measurement: the measurement that the choice was made from.
        problem: the problem that was solved.
        solution: the solution whose choice was applied.
        smallest: the smallest use that was found, or None if no resource is minimized.
        refined: result of refining, or None without refining.
        guarded: the candidates evaluated on the held-out samples, or None if there are none.
        final: the choice that was made in the end (see `qcompress.steps.repeating`), or None without a guard.
        fitted: the measurement with the moments that codes and factors were finally fitted to.
        chosen: the compressed model before fine-tuning.
        loss_measured: true loss of ``chosen`` on all data.
        smaller: the compressed model.
        latency_measured_s: seconds of ``smaller`` in the engine, or None if it was not timed.
    """

    measurement: Measurement
    problem: Problem
    solution: Solution
    smallest: SmallestUse | None
    refined: Refined | None
    guarded: Guarded | None
    final: Proposal | None
    fitted: Measurement
    chosen: nn.Module
    loss_measured: float
    smaller: nn.Module
    latency_measured_s: float | None

    @property
    def refitted(self) -> bool:
        """Whether the result depends on the held-out samples: codes and factors, or options chosen again."""
        return self.fitted is not self.measurement or bool(self.moved)

    @property
    def moved(self) -> int | None:
        """Number of parts that differ from the guard's choice, or None without a guard."""
        if self.guarded is None or self.final is None:
            return None
        before, after = (
            [(option, part in item.nearest) for part, option in enumerate(item.choice.tolist())]
            for item in (self.guarded.best, self.final)
        )
        return sum(was != now for was, now in zip(before, after, strict=True))

    @property
    def tuned(self) -> bool:
        """Whether the model was fine-tuned."""
        return self.smaller is not self.chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """True losses and the caller's metric, see `Report`."""

    validation: float | None
    validation_error: float | None
    finetuned: float | None
    metric_before: float | None
    metric_after: float | None
    doubt: float | None


def make_report(request: Request, run: RunFolder, outcome: Outcome) -> Report:
    """Measure the true losses and return the figures of the run, saved in the folder as JSON and Markdown."""
    measurement, problem, solution, guarded = outcome.measurement, outcome.problem, outcome.solution, outcome.guarded
    with run.timed("check"):
        checked = _checked(request, outcome)
        taken = recount(request, measurement, outcome.smaller, solution.usage) if measurement.sets else {}
    assert solution.objective is not None  # noqa: S101
    assert solution.choice is not None  # noqa: S101
    report = Report(
        loss=measurement.loss,
        loss_predicted=solution.objective,
        loss_predicted_error=prediction_error(measurement, problem, solution.choice),
        loss_measured=outcome.loss_measured,
        loss_validation=checked.validation,
        loss_validation_error=checked.validation_error,
        loss_finetuned=checked.finetuned,
        latency_measured_s=outcome.latency_measured_s,
        refitted=outcome.refitted,
        parts_moved=outcome.moved,
        bound=solution.bound,
        gap=solution.gap,
        status=str(solution.status),
        solver=solution.solver,
        wall_s=run.wall_s,
        usage={**_usage(request, outcome), **taken},
        original=dict(request.original_of(measurement)),
        budgets=dict(problem.budgets),
        metric_before=checked.metric_before,
        metric_after=checked.metric_after,
        metric_name=_name_of(request.evaluate),
        parts=tuple(_part_reports(outcome)),
        skipped={item.name: item.reason for item in measurement.unchanged},
        skipped_bytes={item.name: item.size_bytes for item in measurement.unchanged},
        refined=None if outcome.refined is None else outcome.refined.to_json(),
        smallest=_smallest(request, outcome),
        candidates=() if guarded is None else guarded.candidates,
        undecided=() if guarded is None else guarded.undecided,
        chosen=None if guarded is None else guarded.best.name,
        measuring=measurement.notes,
        warnings=(
            *recount_warnings(outcome.smaller, taken, solution.usage, problem.budgets),
            *_warnings(request, outcome, checked),
        ),
    )
    if run.path is not None:
        run.save("report.json", report.save)
        calibration, data = request.calibration, list(request.kept) or request.data
        classes_last = measurement.loss == "kl" or measurement.loss.startswith("kl-tail")
        if classes_last and isinstance(calibration.model, nn.Module):
            with rounding_of(request, outcome.smaller):
                agreed = agreement(calibration.goal, outcome.smaller, data, forward=calibration.forward)
            run.save("agreement.json", agreed.save)
        else:
            run.discard("agreement.json")
        run.save("summary.md", partial(write_text, report.to_markdown()))
    return report


def rounding_of(request: Request, model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a compressed model rounds what the engine rounds, if there is one."""
    return nullcontext() if request.engine is None else request.engine.rounding(model)


def write_text(text: str, path: Path) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def loss_of_choice(request: Request, run: RunFolder, chosen: nn.Module) -> float:
    """Return the true loss on all data of the compressed model before fine-tuning.

    Raises:
        ResultNotFiniteError: the outputs or losses are not finite.
    """
    with run.timed("check"):
        return float(_losses_of(request, chosen, request.data).mean())


def _losses_of(request: Request, model: nn.Module, data: Iterable[Any]) -> NDArray[np.float64]:
    """Return ``(samples,)`` true losses of a compressed model."""
    calibration = request.calibration
    with rounding_of(request, model):
        losses = sample_losses(calibration.goal, model, data, loss=calibration.loss, forward=calibration.forward)
    if not np.isfinite(losses).all():
        raise ResultNotFiniteError("the loss of the compressed model is NaN or infinite for a sample of the data")
    return losses


def _checked(request: Request, outcome: Outcome) -> _Checked:
    """Measure the losses of the resulting models.

    If the result depends on the held-out samples, the held-out loss is the one that the guard measured before.
    """
    evaluate, kept = request.evaluate, list(request.kept)
    validation: tuple[float | None, float | None] = None, None
    if outcome.refitted and outcome.guarded is not None:
        validation = outcome.guarded.won.loss_validation, outcome.guarded.error
    elif kept:
        losses = _losses_of(request, outcome.smaller, kept)
        validation = float(losses.mean()), standard_error(losses)
    with rounding_of(request, outcome.smaller):
        metric_after = None if evaluate is None else metric_of(evaluate, outcome.smaller, "the compressed model")
    return _Checked(
        validation=validation[0],
        validation_error=validation[1],
        finetuned=float(_losses_of(request, outcome.smaller, request.data).mean()) if outcome.tuned else None,
        metric_before=None if evaluate is None else request.metric_before,
        metric_after=metric_after,
        doubt=_doubt(request, kept),
    )


def _doubt(request: Request, kept: list[Any]) -> float | None:
    """Return the number of wrong answers to expect of the original on the held-out samples, see `Loss.doubt`."""
    calibration = request.calibration
    loss = as_loss(calibration.loss)
    if not kept or opened_of(calibration.goal) is not None:
        return None
    run = steady(calibration.forward)
    with forwards.evaluating(calibration.goal), torch.no_grad():
        total = 0.0
        for batch in kept:
            doubt = loss.doubt(forwards.run(calibration.goal, batch, run), batch)
            if doubt is None:
                return None
            total += doubt
    return total


def _probabilities(request: Request) -> bool:
    """Whether the loss takes the original's outputs for the first batch, which are probabilities, for logits."""
    calibration = request.calibration
    if opened_of(calibration.goal) is not None:
        return False
    with forwards.evaluating(calibration.goal), torch.no_grad():
        output = forwards.run(calibration.goal, calibration.first_batch(), steady(calibration.forward))
    return as_loss(calibration.loss).takes_probabilities(output)


def _name_of(evaluate: Any) -> str:
    """Return the name of a function, also if some of its arguments are given already; ``"metric"`` if it has none."""
    name = getattr(evaluate.func if isinstance(evaluate, partial) else evaluate, "__name__", "")
    return name if name.isidentifier() else "metric"  # a lambda has no name of its own


def _smallest(request: Request, outcome: Outcome) -> dict[str, Any] | None:
    """Return the smallest use that was found: of the package's own file its true bytes, not those with a reserve."""
    found = None if outcome.smallest is None else outcome.smallest.to_json()
    if found is None or found["resource"] != FILE_BYTES or request.engine is not None:
        return found
    least = with_file_bytes(request.copied, outcome.measurement, tight=True).fixed[FILE_BYTES]
    reserve = outcome.problem.fixed[FILE_BYTES] - least
    return found | {"usage": _usage(request, outcome)[FILE_BYTES], "at_least": found["at_least"] - reserve}


def _usage(request: Request, outcome: Outcome) -> dict[str, float]:
    """Return the use of every resource, with the true size of the package's own file instead of the estimate."""
    usage = outcome.solution.usage
    if FILE_BYTES not in usage or request.engine is not None:
        return usage
    return {**usage, FILE_BYTES: float(compressed_size(outcome.smaller).file_bytes)}


def _warnings(request: Request, outcome: Outcome, checked: _Checked) -> Iterator[str]:
    """Yield warnings where the figures may not hold."""
    measurement, solution, loss_validation = outcome.measurement, outcome.solution, checked.validation
    seen = (loss_validation, outcome.loss_measured if checked.finetuned is None else checked.finetuned)
    helps = cautions.what_helps(
        measurement,
        opened=opened_of(request.calibration.goal) is not None,
        given=request.measurement is not None,
        refined=request.refine_rounds > 0,
        in_rounds=request.rounds > 1,
    )
    yield from cautions.of_limit(request.loss_limit, next(loss for loss in seen if loss is not None), helps)
    if loss_validation is not None and not outcome.tuned:
        if outcome.refitted and outcome.guarded is not None:  # the held-out loss is that of the guard's choice
            predicted: float | None = outcome.guarded.won.loss_predicted
        else:
            predicted = solution.objective
        assert predicted is not None  # noqa: S101
        yield from cautions.of_prediction(measurement.loss, predicted, loss_validation, helps)
        yield from cautions.of_certainty(checked.doubt)
    yield from cautions.of_probabilities(measurement.loss, given=_probabilities(request))
    yield from cautions.of_selections(measurement, helps)
    yield from cautions.of_split(request.split, given=request.measurement is not None)
    yield from cautions.of_inputs(measurement, solution, outcome.fitted)
    if hasattr(request.model, "generate"):
        yield from cautions.of_attention(measurement, solution)
    asked = {name: limit for name, limit in outcome.problem.budgets.items() if name != request.minimize}
    yield from loose(asked, request.original_of(measurement))
    yield from _of_file(outcome.smaller)
    yield from _of_constants(request)
    yield from _of_codes_before(request, outcome.smaller)
    yield from cautions.of_latency(outcome.problem.budgets.get(LATENCY), outcome.latency_measured_s)


def _of_file(model: nn.Module) -> Iterator[str]:
    """Warn if `qcompress.save_compressed` would refuse the result."""
    try:
        if opened_of(model) is None:
            require_tensors(model)
    except ArtefactError as error:
        yield f"save_compressed() would refuse this model: {error}"


def _of_constants(request: Request) -> Iterator[str]:
    """Warn of tensors that the model computes with and that `qcompress.save_compressed` leaves out."""
    calibration = request.calibration
    if request.engine is not None or opened_of(calibration.model) is not None:
        return
    if names := constants_read(request.copied, calibration.first_batch(), calibration.forward):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield (
            f"save_compressed() leaves out plain tensors that the model computes with ({', '.join(names[:3])}{more}): "
            "load_compressed() takes them from the model that model_factory makes. With register_buffer a file holds "
            "them"
        )


def _of_codes_before(request: Request, smaller: nn.Module) -> Iterator[str]:
    """Warn if the given model was stored in codes already, and the result takes more bytes than these."""
    before, after = record_of(request.calibration.goal), record_of(smaller)
    if before is None or after is None or before.payload_bytes is None or after.payload_bytes is None:
        return
    still = {item.part.path for item in after.parts if item.stored}
    lost = [item.part.path for item in before.parts if item.stored and item.part.path not in still]
    if lost and after.payload_bytes > before.payload_bytes:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        yield (
            f"the given model was compressed to {before.payload_bytes:,} bytes already, and the result takes "
            f"{after.payload_bytes:,}: {', '.join(lost[:3])}{more} had codes and are stored in full precision again. "
            "Put prune_quantize() on offer for them, or compress the original at once"
        )


def _part_reports(outcome: Outcome) -> Iterator[PartReport]:
    """Yield the choice of every part that has one, as it is finally stored.

    After training, weights are rounded to nearest. With channels on offer, parts are their sets, which the record does
    not list.
    """
    measurement, problem, choice = outcome.measurement, outcome.problem, outcome.solution.choice
    assert choice is not None  # noqa: S101
    record, chosen, errors = record_of(outcome.smaller), problem.flat(choice), measurement.standard_error
    transforms = [options[option] for options, option in zip(measurement.transforms, choice.tolist(), strict=True)]
    stored = transforms if record is None or measurement.sets else [item.transform for item in record.parts]
    before, after = (bytes_of_parts(problem, flat) for flat in (problem.group_offsets[:-1], chosen))
    for index, (part, transform) in enumerate(zip(measurement.parts, stored, strict=True)):
        if not has_choice(measurement.transforms[index]):
            continue
        yield PartReport(
            name=part.name,
            option=transform.label,
            bytes_before=float(before[index] if measurement.sets else part.target.dense_bytes),
            bytes_after=float(after[index]),
            loss_alone=float(problem.cost[chosen[index]]),
            loss_alone_error=None if errors is None else float(errors[chosen[index]]),
        )


def bytes_of_parts(problem: Problem, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``(G,)`` bytes of the flat options ``chosen``; bytes shared by two parts count half for each."""
    used = problem.resources["bytes"][chosen]
    if (terms := problem.resource_pairs.get("bytes")) is None:
        return used
    x = np.zeros(problem.num_options)
    x[chosen] = 1.0
    return np.asarray(used + 0.5 * (terms @ x + terms.T @ x)[chosen])
