"""The steps of `compress`, each from the values before it to one more: a step does only what its name says.

Every step takes the `Request` and the `RunFolder`, and gives its value by `RunFolder.once` where making it takes
time, keyed by what matters to it alone: another budget, solver or time limit leaves the measurement standing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formulations import InfeasibleBudgetError, Problem
from formulations.files import replacing
from qcompress import cautions
from qcompress.budgets import FILE_BYTES, Amount, fixed_use, with_resources
from qcompress.compressed.apply import NEAREST, apply, chosen_transforms
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import compressed_size, load_compressed, save_compressed
from qcompress.compressed.file_bytes import with_file_bytes
from qcompress.compressed.record import record_of
from qcompress.engines.base import Engine
from qcompress.formulation import formulate
from qcompress.guard import Guarded, guard, kept_loss
from qcompress.identity import Identity, identify, identify_batches
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.latency import LATENCY, TimingProgress, load_times, save_times, time_options
from qcompress.measuring.measure import MeasureProgress, measure
from qcompress.measuring.offered import Offered
from qcompress.measuring.refit import refit, with_fit_of
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.calibration import Calibration
from qcompress.model.forward import first_batch
from qcompress.model.samples import Split, split_samples
from qcompress.proposals import ADDITIVE, SOLVER, Proposal, proposals
from qcompress.refinement import Refined, RefineStep, refine
from qcompress.report import Report, make_report
from qcompress.run_folder import Kept, RunFolder
from qcompress.scalars import as_number
from qcompress.training.finetune import FinetuneProgress, finetune
from solvers import Progress, Solution, Solver, SolverError, judge, solve
from solvers.base import relative_gap
from solvers.composites.tied import Tied
from solvers.run import as_solver
from solvers.smallest_use import SmallestUse, smallest_use

KEPT = "validation"
"""Name of the identity of the batches kept aside."""

REFINED = "refined"
"""Name of the refined choice among the guard's."""

MEASUREMENT_FILE = "measurement.npz"
REFITTED_FILE = "refitted.npz"
MODEL_FILE = "model.safetensors"


class NoChoiceError(SolverError, RuntimeError):
    """The solver found no choice within the budgets of ``problem``."""

    problem: Problem | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """Who is told how the steps go on; see `qcompress.compress`."""

    on_encode: Callable[[EncodeProgress], None] | None
    on_measure: Callable[[MeasureProgress], None] | None
    on_timing: Callable[[TimingProgress], None] | None
    on_progress: Callable[[Progress], None] | None
    on_round: Callable[[RefineStep], None] | None
    on_finetune: Callable[[FinetuneProgress], None] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """What `compress` was asked for, checked as far as it can be before anything runs; see there.

    Attributes:
        data: all batches, those of ``calibration`` and the samples kept aside.
        split: how the data was split; whose ``calibration`` is the calibration's data.
        kept: batches that nothing is fitted to, or none.
        guard: whether choices are tried on them.
        copied: a copy of the model, made before anything was measured: what is compressed is a copy of it.
        measurement: one that was made earlier, or None.
        identities: of what is in ``calibration`` and ``kept``, or nothing where no folder keeps the run.
        room_bytes: more room in the file, where a first try came out too large.
        engine: what the choice is made for, or None for our own file.
    """

    calibration: Calibration
    data: Iterable[Any]
    split: Split
    kept: Iterable[Any]
    guard: bool
    copied: nn.Module
    measurement: Measurement | None
    offered: Offered
    method: str
    granularity: str | int
    budget: Mapping[str, Amount]
    minimize: str | None
    loss_limit: float | None
    pairs: bool | float
    solver: Solver
    time_limit: float | None
    refine_rounds: int
    batch_norm_data: Iterable[Any] | None
    finetune_steps: int
    learning_rate: float
    evaluate: Callable[[nn.Module], float] | None
    callbacks: Callbacks
    identities: Mapping[str, Identity]
    room_bytes: float = 0.0
    engine: Engine | None = None

    def measured_from(self) -> dict[str, Any]:
        """What the measurement depends on."""
        identities = {name: own for name, own in self.identities.items() if name != KEPT}
        if self.measurement is not None:
            model = {name: own for name, own in identities.items() if name == "model"}
            return {**model, "measurement": replace(self.measurement, codes={})}  # codes follow from the rest
        return {
            **identities,
            "options": self.offered.to_json(),
            "method": self.method,
            "granularity": self.granularity,
        }

    def solved_by(self) -> dict[str, Any]:
        """What, besides the problem, a solution depends on."""
        solver = [self.solver.name, self.solver]
        return {"solver": solver, "time_limit": self.time_limit, "seed": self.calibration.seed}


def copied(own: Calibration) -> nn.Module:
    """A copy of the model that shares nothing with it and runs on its own weights.

    Raises:
        ModelError: there can be none; says why (see `qcompress.compressed.copying`).
    """
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(own.seed)
        return own_copy(own.model, own.first_batch(), own.forward)


def kept_aside(request: Request, run: RunFolder) -> Request:
    """The request with the samples that nothing is fitted to, where none were given and the guard needs them."""
    own, split, kept = request.calibration, request.split, request.kept
    if request.guard and kept == ():
        split = split_samples(request.copied, request.data, own.forward)
        kept = split.kept
    own = replace(own, data=split.calibration)
    identities: dict[str, Identity] = {}
    if run.path is not None:
        identities = {**own.identities(), KEPT: identify_batches(kept, KEPT)}
    return replace(request, calibration=own, split=split, kept=kept, identities=identities)


def measured(request: Request, run: RunFolder) -> Measurement:
    """What every option does, with its time where a budget is for that."""
    own, tell = request.calibration, run.watched(request.callbacks.on_measure)

    def make(cache: Path | None) -> Measurement:
        return measure(
            own.model,
            own.data,
            request.offered.by_pattern,
            skip=request.offered.skip,
            only=request.offered.only,
            method=request.method,
            loss=own.loss,
            forward=own.forward,
            granularity=request.granularity,
            seed=own.seed,
            cache=cache,
            on_progress=tell,
            on_encode=run.watched(request.callbacks.on_encode),
        )

    kept = Kept(MEASUREMENT_FILE, Measurement.save, Measurement.load)
    given = request.measurement
    measurement = run.once(
        "measure", make if given is None else lambda _: given, key=request.measured_from(), kept=kept
    )
    measurement = with_resources(measurement, request.budget)
    if FILE_BYTES in request.budget and request.engine is None:
        measurement = with_file_bytes(request.copied, measurement, more=request.room_bytes)
    if LATENCY not in request.budget or LATENCY in measurement.resources:
        return measurement
    return run.once(
        "time",
        lambda _: time_options(
            own.model,
            measurement,
            first_batch(request.data),
            forward=own.forward,
            on_progress=run.watched(request.callbacks.on_timing),
        ),
        key={**request.measured_from(), **request.identities},
        kept=Kept("latency.npz", save_times, partial(load_times, measurement)),
    )


def formulated(request: Request, run: RunFolder, measurement: Measurement) -> Problem:
    """The problem to solve.

    Raises:
        InfeasibleBudgetError: no choice is within the budgets.
    """
    problem = formulate(measurement, request.budget, pairs=request.pairs)
    try:
        problem.require_reachable_budgets()
    except InfeasibleBudgetError as error:
        if "bytes" in problem.budgets:
            error.args = (f"{error}. {fixed_use(measurement)}",)
        raise
    if run.path is not None:
        problem.save(run.path / "problem.npz")
    return problem


def minimized(request: Request, run: RunFolder, problem: Problem) -> SmallestUse | None:
    """The smallest use of the resource that is to be small, where one is.

    Raises:
        InfeasibleBudgetError: no choice is predicted to lose so little.
    """
    resource, limit = request.minimize, request.loss_limit
    if resource is None or limit is None:
        return None
    return run.once(
        "minimize",
        lambda _: smallest_use(
            problem,
            resource,
            limit,
            solver=request.solver,
            time_limit=request.time_limit,
            seed=request.calibration.seed,
            on_progress=run.watched(request.callbacks.on_progress),
        ),
        key={"problem": problem.fingerprint(), "resource": resource, "loss": limit, **request.solved_by()},
        kept=Kept("smallest.json", SmallestUse.save, SmallestUse.load),
    )


def limited(run: RunFolder, problem: Problem, smallest: SmallestUse | None) -> Problem:
    """The problem with the smallest use as a budget."""
    if smallest is None:
        return problem
    problem = problem.with_budgets(**{smallest.resource: smallest.usage})
    if run.path is not None:
        problem.save(run.path / "problem.npz")
    return problem


def solved(request: Request, run: RunFolder, problem: Problem, smallest: SmallestUse | None) -> Solution:
    """The solver's choice, not worse than the one that has the smallest use.

    Raises:
        NoChoiceError: it found none.
    """
    solution = run.once(
        "solve",
        lambda _: solve(
            problem,
            request.solver,
            time_limit=request.time_limit,
            seed=request.calibration.seed,
            initial=None if smallest is None else smallest.choice,
            on_progress=run.watched(request.callbacks.on_progress),
        ),
        key={
            "problem": problem.fingerprint(),
            "initial": None if smallest is None else smallest.choice,
            **request.solved_by(),
        },
        kept=Kept("solved.json", Solution.save, Solution.load),
    )
    if solution.choice is None:
        error = NoChoiceError(
            f"solver {solution.solver!r} found no choice within the budgets {dict(problem.budgets)} "
            f"(status {solution.status}); allow more time or raise a budget"
        )
        error.problem = problem
        raise error
    return solution


def refined(
    request: Request, run: RunFolder, measurement: Measurement, problem: Problem, solution: Solution
) -> Refined | None:
    """Better choices by true loss, where rounds are asked for."""
    if request.refine_rounds == 0:
        return None
    own, choice = request.calibration, solution.choice
    assert choice is not None  # noqa: S101

    def make(cache: Path | None) -> Refined:
        better = refine(
            request.copied,
            own.data,
            measurement,
            problem,
            choice,
            rounds=request.refine_rounds,
            solver=request.solver,
            time_limit=request.time_limit,
            seed=own.seed,
            loss=own.loss,
            forward=own.forward,
            cache=cache,
            on_progress=run.watched(request.callbacks.on_measure),
            on_round=request.callbacks.on_round,
        )
        if cache is not None:
            cache.unlink(missing_ok=True)
        return better

    key = {
        **request.measured_from(),
        **request.identities,
        **request.solved_by(),
        "problem": problem.fingerprint(),
        "choice": choice,
        "rounds": request.refine_rounds,
    }
    return run.once("refine", make, key=key, kept=Kept("refined.json", Refined.save, Refined.load))


def moved(problem: Problem, solution: Solution, better: Refined | None) -> Solution:
    """The solution with the refined choice; its bound is that of the first prediction, as its objective."""
    if better is None or not better.steps:
        return solution
    judged = judge(problem, better.choice)
    return replace(
        solution,
        choice=judged.choice,
        objective=judged.objective,
        usage=judged.usage,
        gap=relative_gap(judged.objective, solution.bound),
        status=judged.status,
        details={**solution.details, "refined": better.to_json()},
    )


def guarded(
    request: Request,
    run: RunFolder,
    measurement: Measurement,
    problem: Problem,
    solution: Solution,
    better: Refined | None,
) -> Guarded | None:
    """Of this and other choices the best on the samples kept aside, where there are any."""
    own, batches = request.calibration, request.batch_norm_data
    if not (request.guard and any(True for _ in request.kept)):
        return None
    ties = () if request.engine is None else request.engine.ties(measurement.parts)
    refined_choice = () if better is None or not better.steps else (Proposal(name=REFINED, choice=better.choice),)

    def make(_: Path | None) -> Guarded:
        others = proposals(
            measurement,
            problem,
            solution,
            pairs=request.pairs,
            solver=Tied(as_solver(SOLVER), tied=ties) if ties else SOLVER,
            time_limit=request.time_limit,
            seed=own.seed,
        )
        seen = kept_loss(
            request.copied, measurement, request.kept, loss=own.loss, forward=own.forward, batch_norm_data=batches
        )
        base = REFINED if refined_choice else ADDITIVE
        within = [own for own in (*refined_choice, *others) if _may_be_taken(own, problem, request.loss_limit, ties)]
        return guard(measurement, problem, within, seen, base=base)

    statistics = {} if run.path is None else {"batch_norm_data": _identity_of(batches, "batch_norm_data")}
    key = {
        **request.measured_from(),
        **request.identities,
        **request.solved_by(),
        **statistics,
        "problem": problem.fingerprint(),
        "choice": solution.choice,
        "refined": () if better is None else better.choice,
        "pairs": request.pairs,
    }
    return run.once("guard", make, key=key, kept=Kept("guard.json", Guarded.save, Guarded.load))


def _may_be_taken(
    proposal: Proposal, problem: Problem, loss_limit: float | None, ties: Sequence[Sequence[str]]
) -> bool:
    """Whether a choice keeps to what an engine ties, and to a limit of the predicted loss where there is one."""
    options = dict(zip(problem.groups, proposal.choice.tolist(), strict=True))
    tied = all(len({options[name] for name in names}) == 1 for names in ties)
    return tied and (loss_limit is None or problem.evaluate(proposal.choice).objective <= loss_limit)


def taken(problem: Problem, solution: Solution, best: Guarded | None, run: RunFolder) -> Solution:
    """The solution with the guard's choice; its bound is that of the solver's problem."""
    if best is not None and (best.best.nearest or (best.best.choice != solution.choice).any()):
        judged = judge(problem, best.best.choice)
        solution = replace(
            solution,
            choice=judged.choice,
            objective=judged.objective,
            usage=judged.usage,
            gap=relative_gap(judged.objective, solution.bound),
            status=judged.status,
            details={**solution.details, "guard": best.best.name, NEAREST: list(best.best.nearest)},
        )
    if run.path is not None:
        solution.save(run.path / "solution.json")
    return solution


def refitted(request: Request, run: RunFolder, measurement: Measurement, solution: Solution) -> Measurement:
    """What the choice is fitted to, over all the data: the samples kept aside have done their work with the choice.

    The measurement stays as it is where none were kept aside, where it was given, where nothing chosen is fitted, and
    before fine-tuning, whose result is then seen on samples that nothing was fitted to.
    """
    own = request.calibration
    if not request.split.kept or request.measurement is not None or request.finetune_steps:
        return measurement
    chosen = chosen_transforms(request.copied, measurement, solution)
    targets = [part.target for part in measurement.parts]
    if not any(
        item.needs_moments(target) or item.needs_squares(target) for item, target in zip(chosen, targets, strict=True)
    ):
        return measurement
    return run.once(
        "refit",
        lambda _: refit(own.model, request.data, measurement, forward=own.forward, seed=own.seed),
        key={**request.measured_from(), **request.identities},
        kept=Kept(REFITTED_FILE, Measurement.save, lambda path: with_fit_of(measurement, Measurement.load(path))),
    )


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
            on_progress=run.watched(request.callbacks.on_finetune),
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
    report = make_report(
        measurement,
        problem,
        solution,
        loss_measured=loss_measured,
        loss_validation=loss_validation,
        refitted=again,
        loss_finetuned=loss_finetuned,
        refined=better,
        smallest=smallest,
        guarded=best,
        warnings=warnings,
        wall_s=run.wall_s,
        metric_before=before,
        metric_after=after,
        stored=None if record is None else [item.transform for item in record.parts],
    )
    if FILE_BYTES in report.usage and request.engine is None:  # room was left for it: what it really is
        size = float(compressed_size(smaller).file_bytes)
        report = replace(report, usage={**report.usage, FILE_BYTES: size})
    if run.path is not None:
        report.save(run.path / "report.json")
        with replacing(run.path / "summary.md") as file:
            file.write(report.to_markdown().encode())
    return report


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


def _identity_of(batches: Iterable[Any] | None, name: str) -> Identity:
    return identify(None) if batches is None else identify_batches(batches, name)


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
