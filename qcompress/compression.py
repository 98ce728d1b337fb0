"""`compress`: from measuring to the report in one call. An interrupted call can be resumed."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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
from qcompress.errors import OptionsError, ResultNotFiniteError
from qcompress.formulation import pair_strength
from qcompress.identity import identified_once
from qcompress.measurement import Measurement, require_measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.measure import require_method
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.remeasure import loss_of
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.measuring.workers import checked_jobs
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import LossFunction, as_loss
from qcompress.model.modes import outside_modes, seeded
from qcompress.model.padding import padding_named
from qcompress.model.samples import Split
from qcompress.model.weights import layer_names
from qcompress.options import Options, prune_quantize
from qcompress.proposals import Proposal
from qcompress.refinement import RefineStep
from qcompress.report import Report
from qcompress.run_folder import RunFolder
from qcompress.scalars import as_flag, as_number, as_whole, plain
from qcompress.steps import Arguments, Request
from qcompress.training.finetune import LEARNING_RATE, FinetuneProgress, require_training
from qcompress.transforms.quantize.integer import IntegerProduct
from solvers import NoChoiceError, Progress, Solution, SolverLike

__all__ = ["NoChoiceError", "Result", "compress"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Result:
    """Result of `compress`: the smaller model and every intermediate value.

    Attributes:
        model: the compressed model, in evaluation mode.
        measurement: costs measured on the original model, with the moments that ``model`` was fitted to.
        problem: the problem that was solved.
        solution: the solution whose choice was applied.
        report: sizes, losses, the proof and every part's choice.
        exported: the engine's file, or None without an engine.
        verification: comparison of the engine's file with ``model``, or None without an engine.
    """

    model: nn.Module
    measurement: Measurement
    problem: Problem
    solution: Solution
    report: Report
    exported: ExportedFile | None = None
    verification: Verification | None = None

    def __repr__(self) -> str:
        return repr(self.report).replace("<Report", "<Result", 1)

    def _repr_markdown_(self) -> str:
        """Show the report in a notebook."""
        return self.report.to_markdown()


@outside_modes
@seeded
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
    rounds: int = 1,
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
    """Compress ``model`` to a budget: measure, choose with ``solver``, apply and report.

    Args:
        model: the original model; neither it nor its mode is changed. A model from `open_model` is compressed block by
            block with ``method="sampled"``; the compensated codes of the choice are fitted to all of ``data``.
        data: re-iterable calibration batches (see `measure`).
        budget: resource → share of the original (up to 1), amount (above 1) or text, for example ``{"bytes": 0.15}``,
            ``{"bytes": "120 kB"}`` or ``{"bits_per_weight": 4.25}`` (see `qcompress.budgets`). A budget for
            ``latency_s`` has every option timed on the first batch (see `time_options`), in the engine if there is a
            ``target``.
        minimize: resource to minimize subject to a predicted loss of at most ``budget["loss"]``, for example
            ``minimize="bytes", budget={"loss": 0.02}``. Other budgets still hold. The smallest use found becomes the
            budget for all later steps; the report says what is proven about it.
        options: options on offer, for all layers or by patterns of their names as in `measure`. The default is
            ``prune_quantize(compensated=True)``; the measurement then holds an ``(in, in)`` matrix for each layer.
        skip: patterns of the names of layers to leave unchanged, as in `measure`.
        only: patterns of the names of layers to compress. Others stay as they are, except that layers which lose inputs
            (removed channels) are refitted.
        solver: name of a solver, a ``solvers.Solver``, or a dimod sampler.
        time_limit: seconds for the solver.
        seed: seed for measuring, solving and shuffling.
        method: ``"fisher"``, ``"direct"`` or ``"sampled"``, as in `measure`.
        loss: ``"kl"``, ``"mse"`` or a callable, as in `measure`.
        forward: ``(model, batch) -> output tensor``, for models that the default does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        pairs: whether to include pair terms, or their strength (see `formulate`).
        measurement: an earlier measurement of this model, used instead of measuring; its options are used.
        validation: re-iterable batches that are never used for measuring or fitting. By default a quarter of the
            samples of ``data`` is held out (see `qcompress.model.samples`); the report warns if that is not possible.
        guard: whether to evaluate several candidates on the held-out samples and to return the best (see
            `qcompress.guard`). The winning way of choosing is then repeated, and compensated codes and whitened factors
            are refitted, on all of ``data``, unless fine-tuning follows or ``measurement`` was given. If False, the
            solver's choice is returned, measured and fitted on all of ``data``.
        target: engine to export to (see `engines`). Only options that it runs are then on offer, and
            ``{"file_bytes": …}`` limits the size of its file. None stands for the package's own file format.
        output: path for the engine's file. It is written, run and compared with the model before it takes this place;
            a file that differs is kept with ``.rejected`` after its name, and an earlier file is left unchanged. A
            folder is replaced only if an earlier run in ``folder`` wrote it and nothing in it has changed since.
        memory: maximum memory of the process while a model from `open_model` is measured, for example ``"4 GB"``.
        jobs: number of processes that measure, as in `measure`.
        batch_norm_data: batches on which to re-estimate batch-norm statistics, or None to leave them unchanged.
        rounds: number of rounds in which channels are removed (see `qcompress.steps.rounds`): budgets are approached in
            equal ratios, and the network is fitted and measured again in between; ``finetune_steps`` are divided among
            the rounds. The result is never worse on the held-out samples than that of one round, which is made
            first. ``measurement``, ``problem`` and ``solution`` are then those of the last round.
        refine_rounds: maximum number of `refine` rounds; each solve uses ``solver`` and ``time_limit``. 0 disables
            refining. Refining never raises the true loss on ``data``, but the choice is then no longer the optimum of
            the prediction.
        finetune_steps: number of `finetune` steps on ``data`` after the choice, with the original as teacher; 0
            disables fine-tuning. The size of the model does not change, and its loss on the held-out samples (on
            ``data`` if there are none) does not rise. Layers left out by ``skip``, ``only`` or the options' patterns
            are not trained; with ``measurement``, only those stay that it names as left out: layers with a matrix
            (norms are trained), and none if it holds removed channels.
        learning_rate: peak learning rate of fine-tuning.
        evaluate: metric ``model -> float``, reported for the original and the compressed model, both in evaluation
            mode.
        folder: folder for intermediate values. An interrupted run resumes from it, and other calls reuse every value
            that still applies: another budget or solver reuses the measurement, other data reuses nothing.
        on_encode: called after the options of each part were encoded, as in `measure`.
        on_measure: called after every measured batch.
        on_timing: called while options are timed.
        on_progress: called while solving, as in `solve`.
        on_round: called after every round of refining that lowered the loss.
        on_finetune: called while fine-tuning, as in `finetune`.

    Raises:
        InfeasibleBudgetError: the budget is below the smallest possible use, which the message states.
        NoChoiceError: the solver found no choice within the budgets.
        ModelError: the measurement belongs to another model, or the model cannot be copied so that the copy runs on
            its own weights; use `apply_` for such a model.
        EngineError: the engine does not exist, or does not support the model or the options.
        VerificationError: the engine does not run its file, or the file does not behave as predicted.
        OptionsError: an argument is outside its range.

    Warns:
        UncheckedWarning: an input of the run in ``folder`` cannot be checked for changes.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> result = compress(model, [torch.randn(32, 8)], budget={"bytes": 0.5})
    >>> result.report.usage["bytes"] <= result.report.budgets["bytes"]
    True
    """
    arguments = Arguments(**locals())
    with identified_once(), contextlib.ExitStack() as stack:
        run = stack.enter_context(RunFolder.alone(arguments.folder))
        request = _checked(arguments)
        stack.enter_context(padding_named(request.kept, "validation"))
        stack.enter_context(padding_named(request.data))
        request = steps.hold_out_samples(request, run)
        if request.rounds > 1:
            return steps.compress_in_rounds(
                request, run, _compressed, lambda result, report: replace(result, report=report)
            )
        return _within_file_budget(request, run)


def _within_file_budget(request: Request, run: RunFolder) -> Result:
    """Run all steps, reserving enough of the file budget for the bytes around the arrays.

    Raises:
        InfeasibleBudgetError: no choice meets the budgets even with the tightest reserve, or the result exceeds them.
    """
    try:
        result = _compressed(request, run)
    except InfeasibleBudgetError:
        if FILE_BYTES not in request.budget or request.engine is not None:
            raise
        request = replace(request, tight_room=True)
        result = _compressed(request, run)
    while result.report.over_file_budget:  # occasionally by a few bytes
        request = replace(request, room_bytes=request.room_bytes + result.report.over_file_budget)
        result = _compressed(request, run)
    return result


def _checked(given: Arguments) -> Request:
    """Check the arguments before any long step and return them as a request."""
    if given.measurement is not None:
        require_measurement(given.measurement)
    require_method(given.method, given.granularity)
    checked_jobs(given.jobs)
    pair_strength(given.pairs)
    finetune_steps, learning_rate = plain(given.finetune_steps), plain(given.learning_rate)
    if finetune_steps != 0 or isinstance(finetune_steps, bool):
        require_training(finetune_steps, learning_rate)
    if given.evaluate is not None and not callable(given.evaluate):
        raise OptionsError(f"evaluate must be a callable model -> float, found {given.evaluate!r}")
    calibration = Calibration(
        model=given.model, data=given.data, forward=given.forward, loss=as_loss(given.loss), seed=given.seed
    )
    budget, loss_limit = split_loss(given.budget, given.minimize, calibration.loss.name)
    require_known(budget, dict.fromkeys([*KNOWN, *(() if given.measurement is None else given.measurement.resources)]))
    steps.require_for_channels(given)
    steps.require_storable(given)
    calibration.note_identities(given.folder)
    engine = targeting.engine_for(calibration, given.target, given.output, given.budget, given.folder)
    if given.measurement is not None:
        _require_fitting(calibration, given.measurement, (given.options, given.skip or None, given.only))
    validation, batch_norm_data = (
        None if batches is None else forwards.read_data(batches, name)
        for name, batches in (("validation", given.validation), ("batch_norm_data", given.batch_norm_data))
    )
    request = Request.of(
        given,
        calibration=calibration,
        data=calibration.data,
        split=Split(calibration=calibration.data),
        validation=validation,
        batch_norm_data=batch_norm_data,
        kept=() if validation is None else validation,
        offered=Offered.of(_offered(given, engine), skip=given.skip, only=given.only),
        engine=engine,
        budget=budget,
        loss_limit=loss_limit,
        solver=steps.resolve_solver(given.solver),
        guard=as_flag(given.guard, "guard"),
        time_limit=None if given.time_limit is None else as_number(given.time_limit, "time_limit", above=0),
        rounds=as_whole(given.rounds, "rounds", least=1),
        refine_rounds=as_whole(given.refine_rounds, "refine_rounds", least=0),
        finetune_steps=finetune_steps,
        learning_rate=learning_rate,
        identities={},
        copied=steps.copy_model(calibration),  # the first forward pass, after all checks that need none
    )
    steps.require_supported_steps(request)
    if given.measurement is None:
        request.offered.require_known(layer_names(request.copied))
    steps.require_times_that_add_up(request)
    if validation is not None:
        steps.require_fitting(request, validation)
    steps.require_possible(request)
    steps.require_solver(request)
    steps.require_loss(request)
    steps.require_batch_norm_data(request)
    return steps.with_metric_before(request)


def _offered(given: Arguments, engine: Engine | None) -> Options | Mapping[str, Options] | Offered:
    """Return the given options, or the defaults of the engine or of the package's own file.

    Options that round activations cannot be refined, so the defaults exclude them when refining.
    """
    if given.options is not None:
        return given.options
    options = prune_quantize(compensated=True) if engine is None else engine.options()
    if not given.refine_rounds:
        return options
    return Options(tuple(offer for offer in options.offers if not isinstance(offer, IntegerProduct)))


def _compressed(request: Request, run: RunFolder) -> Result:
    """Run all steps in order."""
    measurement = targeting.restrict_to_engine(request, run, steps.measure_options(request, run))
    request = replace(request, solver=targeting.with_ties(request.engine, measurement, request.solver))
    seconds = targeting.clock_of(request, measurement)
    problem = steps.formulate_problem(request, run, measurement, timed=seconds is not None)
    smallest = steps.minimize_use(request, run, problem)
    problem = steps.with_smallest_use(run, problem, smallest)
    start = targeting.with_reachable_budget(request, measurement, seconds, problem)
    solution = steps.solve_problem(request, run, start, smallest)
    stated, solution = targeting.solve_in_time(request, run, seconds, problem, start, solution)
    better = steps.refine_choice(request, run, measurement, problem, solution)
    best = steps.guard_choice(request, run, measurement, problem, solution, better, stated=stated, seconds=seconds)
    final = steps.choose_again(request, run, measurement, problem, best)
    finished = partial(
        _finished,
        request,
        run,
        steps.with_refined_choice(problem, solution, better),
        partial(
            steps.Outcome, measurement=measurement, problem=problem, smallest=smallest, refined=better, guarded=best
        ),
    )
    try:
        return finished(final)
    except ResultNotFiniteError:
        if (earlier := steps.finite_choice(request, best)) is None:
            raise
        return finished(earlier, refit=False)


def _finished(
    request: Request,
    run: RunFolder,
    solution: Solution,
    decided: partial[steps.Outcome],
    final: Proposal | None,
    *,
    refit: bool = True,
) -> Result:
    """Run the steps from a choice to the report and the engine's file.

    Raises:
        ResultNotFiniteError: outputs or losses of the compressed model are not finite.
    """
    measurement, problem = decided.keywords["measurement"], decided.keywords["problem"]
    solution = steps.with_final_choice(problem, solution, final, run)
    fitted = steps.refit_moments(request, run, measurement, solution) if refit else measurement
    chosen = steps.apply_choice(request, run, fitted, solution, refitted=fitted is not measurement)
    chosen = steps.fit_in_turn(request, run, measurement, solution, chosen)
    loss_measured = steps.loss_of_choice(request, run, chosen)
    smaller = steps.finetune_model(request, run, measurement, solution, chosen)
    outcome = decided(
        solution=solution,
        final=final,
        fitted=fitted,
        chosen=chosen,
        loss_measured=loss_measured,
        smaller=smaller,
        latency_measured_s=targeting.time_model(request, run, smaller, measurement),
    )
    report = steps.make_report(request, run, outcome)
    file, verification = targeting.export_model(request, run, smaller)
    return Result(
        model=smaller,
        measurement=fitted,
        problem=problem,
        solution=solution,
        report=report,
        exported=file,
        verification=verification,
    )


def _require_fitting(calibration: Calibration, measurement: Measurement, offer: Iterable[object]) -> None:
    """Check that a given measurement was made of this model with this loss.

    Raises:
        ModelError: it belongs to another model.
        OptionsError: it was made with another loss, or options were given as well.
    """
    if any(item is not None for item in offer):
        raise OptionsError(
            "a measurement has its own options: give options (with skip and only) or measurement, not both"
        )
    require_measured(calibration.model, measurement.model_fingerprint)
    loss_of(measurement, calibration.loss)
