"""Steps of `compress` for an engine: search only what it supports, time it, and write and verify its file."""

import itertools
import os
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from formulations import Problem
from formulations.drafts import clear_left
from formulations.files import AnyPath, drafting
from qcompress.budgets import BITS_PER_WEIGHT, LATENCY, without_resources
from qcompress.engines.base import Engine
from qcompress.engines.companions import require_companions, with_companions
from qcompress.engines.export import ExportedFile, draft_file, require_free
from qcompress.engines.in_time import Seconds, solved_in_time, with_reachable_time, without_time_budget
from qcompress.engines.legal import for_engine
from qcompress.engines.registry import as_engine
from qcompress.engines.verify import BY_ITSELF, Verification, emulated, speedup_of, verify
from qcompress.errors import BatchError, DataError, EngineError, OptionsError, VerificationError
from qcompress.measurement import Measurement
from qcompress.measuring.latency import load_times, save_times
from qcompress.measuring.stopwatch import conditions
from qcompress.model.batches import samples
from qcompress.model.calibration import Calibration
from qcompress.model.opened import opened_of
from qcompress.proposals import feasible_settings
from qcompress.run_folder import Kept, RunFolder, has_written, remove, require_no_file_of_its_own
from qcompress.steps import Request
from qcompress.steps.choosing import local_solver, unless_interrupted
from solvers import Solution, Solver, solve
from solvers.composites.tied import TiedSolver
from solvers.solution import uninterrupted

ASKED = "latency_s asked for"
"""Key in a solution's details: the time budget that the choice was solved for."""

VERIFIED = 2  # number of samples on which the engine's file is compared
VERIFIED_NUMBERS = 16  # the same for outputs of one number, whose spread is over the samples


def engine_for(
    calibration: Calibration,
    target: str | Engine | None,
    output: AnyPath | None,
    budget: Collection[str] = (),
    folder: AnyPath | None = None,
) -> Engine | None:
    """Return the target engine, if any, after checking that it supports the model.

    What an earlier run in ``folder`` wrote as ``output`` may be replaced.

    Raises:
        OptionsError: an output was given without a target, or a file that only goes with an output was.
        EngineError: the engine does not exist, does not support the model, or cannot measure seconds for a time budget;
            or something else exists where its file is to be written.
        MissingError: a package of the engine is missing.
    """
    if target is None:
        if output is not None:
            raise OptionsError(
                f"output={str(output)!r} is an engine's file: name the engine too, for example target='llama.cpp'"
            )
        return None
    engine = as_engine(target)
    if LATENCY in budget and (why := engine.why_not_timed()):
        raise EngineError(why)
    if output is None:
        require_companions(engine, None)
    else:
        require_no_file_of_its_own(folder, Path(output))
        clear_left(Path(os.path.realpath(output)))  # drafts are beside what a link leads to
        require_free(engine, Path(output), own=has_written(folder, Path(output)))
    try:
        engine.sizes(calibration.model, (), (), calibration.first_batch())
    except BatchError as error:
        if calibration.forward is not None:
            error.args = (f"{error}. {BY_ITSELF}",)
        raise
    if output is not None and calibration.forward is not None:
        _require_emulated(engine, calibration)
    return engine


def _require_emulated(engine: Engine, calibration: Calibration) -> None:
    """Check that the engine can be compared with the model on a sample, as done after writing.

    Raises:
        EngineError: it cannot; the message says why.
    """
    try:
        emulated(engine, calibration.model, [next(samples(calibration.first_batch()))])
    except DataError as error:
        raise EngineError(f"{str(error).partition(';')[0]}. {BY_ITSELF}") from error


def restrict_to_engine(request: Request, run: RunFolder, measurement: Measurement) -> Measurement:
    """Restrict the measurement to what the engine runs, with the bytes of its file and, if budgeted, its seconds."""
    engine = request.engine
    if engine is None:
        return measurement
    calibration = request.calibration
    # seconds may be those of PyTorch, and an engine may offer choices for other weights
    measurement = without_resources(measurement, (LATENCY, BITS_PER_WEIGHT))
    measurement = for_engine(engine, calibration.model, measurement, calibration.first_batch(), request.budget)
    if LATENCY not in request.budget:
        return measurement
    return run.once(
        "time",
        lambda _: engine.time_options(
            calibration.model, measurement, calibration.first_batch(), run.watched(request.on_timing)
        ),
        key={
            **request.measured_from(),
            **request.identities,
            **conditions(calibration.model),
            "engine": [engine.name, engine],
        },
        kept=Kept("latency.npz", save_times, partial(load_times, measurement)),
    )


def clock_of(request: Request, measurement: Measurement) -> Seconds | None:
    """Return the timer for whole choices if a budget is in seconds, else None."""
    engine, calibration = request.engine, request.calibration
    if engine is None or LATENCY not in request.budget or request.minimize is not None:
        return None
    return lambda choices: engine.seconds_of(
        calibration.model, measurement, [choice.tolist() for choice in choices], calibration.first_batch()
    )


def with_reachable_budget(
    request: Request, measurement: Measurement, seconds: Seconds | None, problem: Problem
) -> Problem:
    """Return the problem; raise its budget for seconds if choices miss it by prediction but meet it when timed."""
    if seconds is None:
        return problem
    solver = local_solver(request, measurement)
    alike = feasible_settings(measurement, without_time_budget(problem)) if request.guard else {}  # which may take one
    return with_reachable_time(
        problem,
        seconds,
        lambda by_time: uninterrupted(
            solve(by_time, solver, time_limit=request.time_limit, seed=request.calibration.seed)
        ),
        [proposal.choice for proposal in alike.values()],
    )


def solve_in_time(
    request: Request, run: RunFolder, seconds: Seconds | None, problem: Problem, start: Problem, solution: Solution
) -> tuple[Problem, Solution]:
    """Solve under smaller budgets for seconds if choices take longer than predicted; return problem and solution."""
    if seconds is None:
        return problem, solution

    def solve_for(stated: Problem) -> Solution:
        return uninterrupted(
            solve(stated, request.solver, time_limit=request.time_limit, seed=request.calibration.seed)
        )

    def make() -> Solution:
        stated, in_time = solved_in_time(problem, start, solution, seconds, solve_for)
        return replace(in_time, details={**in_time.details, ASKED: stated.budgets[LATENCY]})

    in_time = run.once(
        "in_time",
        unless_interrupted(make),
        key={
            **request.judged_by(),
            "problem": problem.fingerprint(),
            "start": start.fingerprint(),
            "choice": solution.choice,
        },
        kept=Kept("in_time.json", Solution.save, Solution.load),
    )
    return problem.with_budgets(**{LATENCY: in_time.details[ASKED]}), in_time


def time_model(request: Request, run: RunFolder, model: nn.Module, measurement: Measurement) -> float | None:
    """Return the seconds of the compressed model in the engine on the timed batch, or None without a time budget.

    The original and the compressed model are timed alternately and the ratio is applied to the original's earlier time,
    so that a machine that became slower does not distort the result.
    """
    engine = request.engine
    if engine is None or LATENCY not in request.budget:
        return None
    with run.timed("check"):
        faster = speedup_of(engine, request.copied, model, [request.calibration.first_batch()])
    return measurement.original[LATENCY] / faster


def with_ties(engine: Engine | None, measurement: Measurement, solver: Solver) -> Solver:
    """Wrap the solver so that it respects the parts that the engine ties together."""
    ties = [] if engine is None else engine.ties(measurement.parts)
    return TiedSolver(solver, tied=ties) if ties else solver


def export_model(request: Request, run: RunFolder, model: nn.Module) -> tuple[ExportedFile | None, Verification | None]:
    """Write the engine's file of ``model`` and compare it on the first samples, if a file was requested.

    The file and its companions are moved into place only after the comparison; until then, existing files stay
    unchanged.

    Raises:
        VerificationError: the engine does not run the file, or its weights or outputs differ from the prediction; the
            file is kept beside the requested path, with ``.rejected`` after its name.
    """
    engine, output = request.engine, request.output
    if engine is None or output is None:
        return None, None
    batch, goal = request.calibration.first_batch(), Path(output)
    own = has_written(run.path, goal)
    require_free(engine, goal, own=own)
    with with_companions(engine, model), drafting(goal, over_folder=own) as draft:
        with run.timed("export"):
            size_bytes = draft_file(engine, model, draft, batch)
        with run.timed("verify"):
            verification = _accepted(engine, model, draft, _first_samples(engine, model, batch), goal)
        require_free(engine, goal, own=has_written(run.path, goal))  # something may have come there meanwhile
        run.exporting(goal, draft)
    run.exported(goal)
    return ExportedFile(path=goal, size_bytes=size_bytes), verification


def _first_samples(engine: Engine, model: nn.Module, batch: Any) -> list[Any]:
    """Return the samples on which the engine's file is compared."""
    if opened_of(model) is not None:  # language models
        return list(itertools.islice(samples(batch), VERIFIED))
    output = emulated(engine, model, [next(samples(batch))]).outputs[0]
    return list(itertools.islice(samples(batch), VERIFIED if output.shape[-1:] != (1,) else VERIFIED_NUMBERS))


def _accepted(engine: Engine, model: nn.Module, draft: Path, batches: list[Any], goal: Path) -> Verification:
    """Compare the file ``draft``; if it is not as predicted, keep it under another name beside ``goal``.

    Raises:
        VerificationError: see `export_model`.
    """
    cause, wrong = None, ""
    try:
        verification = verify(draft, model, batches, target=engine)
        if verification.ok:
            return verification
        wrong = f"does not match the chosen model: {verification.why_not}"
    except Exception as error:  # an engine may raise anything about a file that it does not take
        cause, wrong = error, f"cannot be verified: {str(error) or type(error).__name__}"
    real = Path(os.path.realpath(goal))
    rejected = real.with_name(f"{real.name}.rejected")
    remove(rejected)
    draft.replace(rejected)
    raise VerificationError(
        f"the new file for {goal} {wrong.replace(str(draft), str(rejected))}. It is kept as {rejected}; "
        + (f"the earlier {goal} is unchanged" if goal.is_file() else f"nothing was written to {goal}")
    ) from cause
