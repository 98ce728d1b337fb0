"""`compress`: from measuring to the report in one call. A call that was cut goes on where it was."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from formulations import InfeasibleBudgetError, Problem
from formulations.files import AnyPath
from qcompress import steps, targeting
from qcompress.budgets import FILE_BYTES, KNOWN, Amount, require_known, split_loss
from qcompress.compressed.apply import require_measured
from qcompress.engines.base import Engine
from qcompress.engines.export import ExportedFile
from qcompress.engines.verify import Verification
from qcompress.errors import OptionsError
from qcompress.formulation import pair_strength
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.latency import TimingProgress
from qcompress.measuring.measure import require_method
from qcompress.measuring.offered import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.remeasure import loss_of
from qcompress.measuring.workers import checked_jobs
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import LossFunction, as_loss
from qcompress.model.samples import Split
from qcompress.options import Options, prune_quantize
from qcompress.refinement import RefineStep
from qcompress.report import Report
from qcompress.run_folder import RunFolder
from qcompress.scalars import as_number, as_whole, plain
from qcompress.steps import Arguments, NoChoiceError, Request
from qcompress.training.finetune import LEARNING_RATE, FinetuneProgress, require_training
from qcompress.transforms.quantize.integer import IntegerProduct
from solvers import Progress, Solution, Solver, SolverLike, SolverUnavailableError
from solvers.run import as_solver

__all__ = ["NoChoiceError", "Result", "compress"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What `compress` gives: the smaller model and every value on the way to it.

    Attributes:
        measurement: costs from before anything was chosen; the moments are those that ``model`` was fitted to.
        exported: the engine's file, where one was asked for.
        verification: how it compares with ``model``.
    """

    model: nn.Module
    measurement: Measurement
    problem: Problem
    solution: Solution
    report: Report
    exported: ExportedFile | None = None
    verification: Verification | None = None


@forwards.seeded
def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: Mapping[str, Amount],
    minimize: str | None = None,
    options: Options | Mapping[str, Options] | Offered | None = None,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
    solver: SolverLike = "auto",
    time_limit: float | None = 60,
    seed: int = 0,
    method: str = "fisher",
    loss: str | LossFunction = "kl",
    forward: forwards.Forward | None = None,
    granularity: str | int = "layer",
    pairs: bool | float = True,
    measurement: Measurement | None = None,
    validation: Iterable[Any] | None = None,
    guard: bool = True,
    target: str | Engine | None = None,
    output: AnyPath | None = None,
    memory: int | str | None = None,
    jobs: int = 1,
    batch_norm_data: Iterable[Any] | None = None,
    refine_rounds: int = 0,
    finetune_steps: int = 0,
    learning_rate: float = LEARNING_RATE,
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: AnyPath | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
    on_measure: Callable[[MeasureProgress], None] | None = None,
    on_timing: Callable[[TimingProgress], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_round: Callable[[RefineStep], None] | None = None,
    on_finetune: Callable[[FinetuneProgress], None] | None = None,
) -> Result:
    """Compress ``model`` to a budget, with the choice made by ``solver`` and a report of how good it is.

    Args:
        model: the original; left as it is. One that `open_model` gave is compressed block by block, by
            ``method="sampled"``; compensated codes of its choice are fitted to all of ``data``.
        data: re-iterable calibration batches (see `measure`).
        budget: resource → share of the original (up to 1), amount (above 1) or words, as ``{"bytes": 0.15}``,
            ``{"bytes": "120 kB"}``, ``{"bits_per_weight": 4.25}`` (see `qcompress.budgets`). With one for ``latency_s``
            every option is timed on the first batch (see `time_options`); with a target, in that engine.
        minimize: a resource to make as small as can be with a predicted loss of at most ``budget["loss"]``, as
            ``minimize="bytes", budget={"loss": 0.02}``; other budgets hold too. The report says what is proven. What
            it finds becomes the budget of all that follows.
        options: what is on offer, for all layers or by patterns of their names as in `measure`. The default is
            ``prune_quantize(compensated=True)``, for which the measurement holds a matrix of the square of each
            layer's inputs.
        skip: patterns of names of layers that stay as they are, as in `measure`.
        only: patterns of the layers that do not.
        solver: a name, a ``solvers.Solver``, or a dimod sampler.
        time_limit: seconds for the solver.
        seed: of measuring, solving and shuffled data.
        method: ``"fisher"`` or ``"direct"``, as in `measure`.
        loss: ``"kl"``, ``"mse"`` or a callable, as in `measure`.
        forward: ``(model, batch) -> output tensor`` where the default does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        pairs: with the terms between different parts, or their strength (see `formulate`).
        measurement: an earlier one of this model, used instead of measuring; it brings its options.
        validation: re-iterable batches that nothing is measured on or fitted to. Without them a quarter of the samples
            of ``data`` is held out (see `qcompress.model.samples`; where it cannot be, the report warns).
        guard: try the solver's choice and others on the held-out samples, and take the best of them (see
            `qcompress.guard`). Compensated codes and whitened factors of that choice are then fitted anew to all of
            ``data``, unless fine-tuning follows or the measurement was given. False takes the solver's choice, measured
            and fitted on all of ``data``.
        target: an engine (see `engines`): only what it runs is on offer, and ``{"file_bytes": …}`` is a budget for its
            own file. None is our file.
        output: where the engine's file is written; it is then run and compared with the model.
        memory: the most that the process may hold while a model that `open_model` gave is measured, as ``"4 GB"``.
        jobs: processes that measure, as in `measure`.
        batch_norm_data: batches to re-estimate batch-norm statistics on, or None to leave them.
        refine_rounds: of `refine` at most, with the solver and the time limit for every solve; 0 for none. The true
            loss on ``data`` does not rise by it; the choice is then no longer the prediction's best.
        finetune_steps: of `finetune` on ``data`` after the choice, with the original as teacher; 0 for none. The
            model stays in the same bytes, and its loss on the samples kept aside (without any, on ``data``) does
            not rise.
        learning_rate: the highest of these steps.
        evaluate: ``model -> float``, reported before and after.
        folder: where all values are written as they come. A run that was cut goes on from them, and another call
            reuses those that nothing changed for: with another budget or solver the measurement, with other data none.
        on_encode: called after the options of every part were worked out, as in `measure`.
        on_measure: called after every measured batch.
        on_timing: called while options are timed.
        on_progress: called while solving, as in `solve`.
        on_round: called after every round of refining that brought something.
        on_finetune: called while fine-tuning, as in `finetune`.

    Raises:
        InfeasibleBudgetError: the budget is below the smallest possible; says what that is.
        NoChoiceError: the solver found no choice within the budgets.
        ModelError: the measurement is of another model, or no copy of the model can be made that runs on its own
            weights; `apply_` takes such a model.
        EngineError: no such engine, or a model or options that it does not take.
        VerificationError: the engine's file is not what was predicted.
        OptionsError: the folder holds a run of an earlier version, or numbers are outside their range.

    Warns:
        UncheckedWarning: whether something is what it was in the folder's run cannot be checked.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> result = compress(model, [torch.randn(32, 8)], budget={"bytes": 0.5})
    >>> result.report.usage["bytes"] <= result.report.budgets["bytes"]
    True
    """
    arguments = Arguments(**locals())
    request, run = _checked(arguments)
    return _within_file_budget(steps.kept_aside(request, run), run)


def _within_file_budget(request: Request, run: RunFolder) -> Result:
    """All steps, with as much room for what is around the arrays in the file as it turns out to take.

    Raises:
        InfeasibleBudgetError: no choice is within the budgets even without that room, or what comes out is not.
    """
    try:
        result = _compressed(request, run)
    except InfeasibleBudgetError:
        if FILE_BYTES not in request.budget or request.engine is not None:
            raise
        request = replace(request, tight_room=True)
        result = _compressed(request, run)
    while result.report.over_file_budget:  # by a few bytes, now and then
        request = replace(request, room_bytes=request.room_bytes + result.report.over_file_budget)
        result = _compressed(request, run)
    return result


def _checked(given: Arguments) -> tuple[Request, RunFolder]:
    """The request for these arguments and its folder; everything is refused that can be before a long step runs."""
    require_method(given.method, given.granularity)
    checked_jobs(given.jobs)
    pair_strength(given.pairs)
    finetune_steps, learning_rate = plain(given.finetune_steps), plain(given.learning_rate)
    if finetune_steps != 0:
        require_training(finetune_steps, learning_rate)
    if given.evaluate is not None and not callable(given.evaluate):
        raise OptionsError(f"evaluate must be a callable model -> float, found {given.evaluate!r}")
    calibration = Calibration(
        model=given.model, data=given.data, forward=given.forward, loss=as_loss(given.loss), seed=given.seed
    )
    engine = targeting.engine_for(calibration, given.target, given.output, given.budget)
    budget, loss_limit = split_loss(given.budget, given.minimize)
    known = [*KNOWN, *(() if given.measurement is None else given.measurement.resources)]
    require_known(budget, dict.fromkeys(known))
    if given.measurement is not None:
        _require_fitting(calibration, given.measurement, given.options)
    if given.validation is not None:
        forwards.first_batch(forwards.checked_data(given.validation), "validation")
    run = RunFolder(given.folder)
    request = Request.of(
        given,
        calibration=calibration,
        split=Split(calibration=given.data),
        kept=() if given.validation is None else given.validation,
        offered=Offered.of(_offered(given, engine), skip=given.skip, only=given.only),
        engine=engine,
        budget=budget,
        loss_limit=loss_limit,
        solver=_ready(given.solver),
        time_limit=None if given.time_limit is None else as_number(given.time_limit, "time_limit", above=0),
        refine_rounds=as_whole(given.refine_rounds, "refine_rounds", least=0),
        batch_norm_data=None if given.batch_norm_data is None else forwards.checked_data(given.batch_norm_data),
        finetune_steps=finetune_steps,
        learning_rate=learning_rate,
        identities={},
        copied=steps.copied(calibration),  # the first pass: what could be checked without one is checked
    )
    steps.require_taken(request)
    steps.require_for_channels(request)
    if given.validation is not None:
        steps.require_fitting(request, given.validation)
    steps.require_possible(request)
    return request, run


def _offered(given: Arguments, engine: Engine | None) -> Options | Mapping[str, Options] | Offered:
    """The options that were given, or the default ones of the engine or of our own file.

    Options that round activations cannot be refined.
    """
    if given.options is not None:
        return given.options
    options = prune_quantize(compensated=True) if engine is None else engine.options()
    if not given.refine_rounds:
        return options
    return Options(tuple(offer for offer in options.offers if not isinstance(offer, IntegerProduct)))


def _compressed(request: Request, run: RunFolder) -> Result:
    """One step after the other."""
    measurement = targeting.legal(request, run, steps.measured(request, run))
    request = replace(request, solver=targeting.tying(request.engine, measurement, request.solver))
    problem = steps.formulated(request, run, measurement)
    smallest = steps.minimized(request, run, problem)
    problem = steps.limited(run, problem, smallest)
    solution = steps.solved(request, run, problem, smallest)
    better = steps.refined(request, run, measurement, problem, solution)
    best = steps.guarded(request, run, measurement, problem, solution, better)
    solution = steps.taken(problem, steps.moved(problem, solution, better), best, run)
    fitted = steps.refitted(request, run, measurement, solution)
    chosen = steps.applied(request, run, fitted, solution, refitted=fitted is not measurement)
    chosen = steps.made_up(request, run, measurement, chosen)
    smaller = steps.finetuned(request, run, chosen)
    outcome = steps.Outcome(
        measurement=measurement,
        problem=problem,
        solution=solution,
        smallest=smallest,
        refined=better,
        guarded=best,
        fitted=fitted,
        chosen=chosen,
        smaller=smaller,
        latency_measured_s=targeting.timed(request, run, smaller, measurement),
    )
    report = steps.reported(request, run, outcome)
    file, verification = targeting.exported(request, run, smaller)
    return Result(
        model=smaller,
        measurement=fitted,
        problem=problem,
        solution=solution,
        report=report,
        exported=file,
        verification=verification,
    )


def _ready(solver: SolverLike) -> Solver:
    """The solver that is meant.

    Raises:
        UnknownSolverError, InvalidOptionError: there is none such.
        SolverUnavailableError: a package is missing.
    """
    meant = as_solver(solver)
    if why := meant.why_not():
        raise SolverUnavailableError(why)
    return meant


def _require_fitting(calibration: Calibration, measurement: Measurement, options: object) -> None:
    """Refuse a given measurement that is none of this model by this loss.

    Raises:
        ModelError: another model.
        OptionsError: another loss, or options beside it.
    """
    if options is not None:
        raise OptionsError("a measurement brings its options: give options or measurement, not both")
    require_measured(calibration.model, measurement.model_fingerprint)
    loss_of(measurement, calibration.loss)
