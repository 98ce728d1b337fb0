"""`compress`: from measuring to the report in one call, which can be cut and goes on where it was."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from formulations import Problem
from formulations.files import AnyPath, read_json, replacing, write_json
from qcompress.compressed.apply import apply
from qcompress.compressed.file import load_compressed, save_compressed
from qcompress.compressed.record import record_of
from qcompress.errors import OptionsError
from qcompress.formulation import formulate
from qcompress.measurement import Measurement
from qcompress.measuring.latency import LATENCY, TimingProgress, time_options
from qcompress.measuring.measure import MeasureProgress, batch_fingerprint, measure
from qcompress.measuring.true_loss import mean_loss
from qcompress.model import forward as forwards
from qcompress.model.losses import LossFunction, as_loss
from qcompress.options import Options, prune_quantize
from qcompress.refinement import Refined, RefineStep, refine, require_rounds
from qcompress.report import Report, make_report
from qcompress.training.finetune import LEARNING_RATE, FinetuneProgress, finetune, require_training
from qcompress.transforms.base import Transform
from solvers import Progress, Solution, SolverError, judge, solve
from solvers.base import relative_gap

MEASUREMENT_FILE = "measurement.npz"
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """What `compress` gives: the smaller model and every value on the way to it."""

    model: nn.Module
    measurement: Measurement
    problem: Problem
    solution: Solution
    report: Report


class NoChoiceError(SolverError, RuntimeError):
    """The solver found no choice within the budgets of ``problem``."""

    problem: Problem | None = None


@forwards.seeded
def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    budget: Mapping[str, float],
    options: Options | None = None,
    solver: Any = "auto",
    time_limit: float | None = 60,
    seed: int = 0,
    method: str = "fisher",
    loss: str | LossFunction = "kl",
    forward: forwards.Forward | None = None,
    granularity: str | int = "layer",
    pairs: bool = True,
    batch_norm_data: Iterable[Any] | None = None,
    refine_rounds: int = 0,
    finetune_steps: int = 0,
    learning_rate: float = LEARNING_RATE,
    evaluate: Callable[[nn.Module], float] | None = None,
    folder: AnyPath | None = None,
    on_measure: Callable[[MeasureProgress], None] | None = None,
    on_timing: Callable[[TimingProgress], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_round: Callable[[RefineStep], None] | None = None,
    on_finetune: Callable[[FinetuneProgress], None] | None = None,
) -> Result:
    """Compress ``model`` to a budget, with the choice made by ``solver`` and a report of how good it is.

    Args:
        model: the original; left as it is.
        data: re-iterable calibration batches (see `measure`).
        budget: resource → fraction of the original (up to 1) or amount (above 1), as ``{"bytes": 0.15}``. With one for
            ``latency_s`` every option is timed on the first batch (see `time_options`).
        options: what is on offer; the default is ``prune_quantize(compensated=True)``, of which the measurement holds a
            matrix of the square of each layer's inputs.
        solver: a name, a ``solvers.Solver``, or a dimod sampler.
        time_limit: seconds for the solver.
        seed: of measuring, solving and shuffled data.
        method: ``"fisher"`` or ``"direct"``, as in `measure`.
        loss: ``"kl"``, ``"mse"`` or a callable, as in `measure`.
        forward: ``(model, batch) -> output tensor`` where the default does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        pairs: with the terms between different parts.
        batch_norm_data: batches to re-estimate batch-norm statistics on, or None to leave them.
        refine_rounds: of `refine` at most, with the solver and the time limit for every solve; 0 for none. The true
            loss on ``data`` does not rise by it; the choice is then no longer the prediction's best.
        finetune_steps: of `finetune` on ``data`` after the choice, with the original as teacher; 0 for none. The
            model stays in the same bytes, and its loss on ``data`` does not rise.
        learning_rate: the highest of these steps.
        evaluate: ``model -> float``, reported before and after.
        folder: where all values are written as they come; a run that was cut goes on from them.
        on_measure: called after every measured batch.
        on_timing: called while options are timed.
        on_progress: called while solving, as in `solve`.
        on_round: called after every round of refining that brought something.
        on_finetune: called while fine-tuning, as in `finetune`.

    Raises:
        InfeasibleBudgetError: the budget is below the smallest possible; says what that is.
        NoChoiceError: the solver found no choice within the budgets.
        OptionsError: the folder holds another run, or numbers outside their range.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> result = compress(model, [torch.randn(32, 8)], budget={"bytes": 0.5})
    >>> result.report.usage["bytes"] <= result.report.budgets["bytes"]
    True
    """
    if refine_rounds != 0:
        require_rounds(refine_rounds)
    if finetune_steps != 0:
        require_training(finetune_steps, learning_rate)
    offered = prune_quantize(compensated=True) if options is None else options
    place = None if folder is None else Path(folder)
    wall_s: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        wall_s[name] = wall_s.get(name, 0.0) + now - clock
        clock = now

    settings = {
        "model": Measurement.fingerprint_of(model),
        "data": batch_fingerprint(forwards.first_batch(forwards.checked_data(data))),
        "options": offered.to_json(),
        "budget": dict(budget),
        "solver": solver if isinstance(solver, str) else getattr(solver, "name", type(solver).__name__),
        "time_limit": time_limit,
        "seed": seed,
        "method": method,
        "loss": as_loss(loss).name,
        "granularity": granularity,
        "pairs": pairs,
        "batch_norm": None if batch_norm_data is None else batch_fingerprint(forwards.first_batch(batch_norm_data)),
        "refine_rounds": refine_rounds,
        "finetune": None if finetune_steps == 0 else {"steps": finetune_steps, "learning_rate": learning_rate},
    }
    if place is not None:
        _open_folder(place, settings)
    measurement = _measured(
        place,
        lambda cache: measure(
            model,
            data,
            offered,
            method=method,
            loss=loss,
            forward=forward,
            granularity=granularity,
            seed=seed,
            cache=cache,
            on_progress=on_measure,
        ),
    )
    if LATENCY in budget and LATENCY not in measurement.resources:
        measurement = time_options(
            model, measurement, forwards.first_batch(data), forward=forward, on_progress=on_timing
        )
        if place is not None:
            measurement.save(place / MEASUREMENT_FILE)
    lap("measure")
    problem = formulate(measurement, budget, pairs=pairs)
    problem.require_reachable_budgets()
    if place is not None:
        problem.save(place / "problem.npz")
    solution = _solved(
        place, problem, lambda: solve(problem, solver, time_limit=time_limit, seed=seed, on_progress=on_progress)
    )
    lap("solve")
    if solution.choice is None:
        error = NoChoiceError(
            f"solver {solution.solver!r} found no choice within the budgets {dict(problem.budgets)} "
            f"(status {solution.status}); allow more time or raise a budget"
        )
        error.problem = problem
        raise error
    refined = None
    if refine_rounds != 0:
        refined = refine(
            model,
            data,
            measurement,
            problem,
            solution.choice,
            rounds=refine_rounds,
            solver=solver,
            time_limit=time_limit,
            seed=seed,
            loss=loss,
            forward=forward,
            cache=None if place is None else place / "refined.json",
            on_progress=on_measure,
            on_round=on_round,
        )
        solution = _moved(problem, solution, refined)
        lap("refine")
    chosen = apply(model, measurement, solution, batch_norm_data=batch_norm_data, forward=forward)
    lap("apply")
    loss_measured = mean_loss(model, chosen, data, loss=loss, forward=forward)
    lap("check")
    smaller, loss_finetuned = chosen, None
    if finetune_steps != 0:
        smaller = _finetuned(
            place,
            model,
            chosen,
            lambda cache: finetune(
                chosen,
                data,
                finetune_steps,
                teacher=model,
                loss=loss,
                learning_rate=learning_rate,
                validation=data,
                forward=forward,
                seed=seed,
                cache=cache,
                on_progress=on_finetune,
            ),
        )
        lap("finetune")
        loss_finetuned = mean_loss(model, smaller, data, loss=loss, forward=forward)
    if place is not None:
        save_compressed(smaller, place / MODEL_FILE)
    before, after = (None, None) if evaluate is None else (evaluate(model), evaluate(smaller))
    lap("check")
    report = make_report(
        measurement,
        problem,
        solution,
        loss_measured=loss_measured,
        loss_finetuned=loss_finetuned,
        refined=refined,
        wall_s=wall_s,
        metric_before=before,
        metric_after=after,
    )
    if place is not None:
        report.save(place / "report.json")
        with replacing(place / "summary.md") as file:
            file.write(report.to_markdown().encode())
    return Result(model=smaller, measurement=measurement, problem=problem, solution=solution, report=report)


def _open_folder(place: Path, settings: dict[str, Any]) -> None:
    """Make the run's folder, or check that it holds this very run.

    Raises:
        OptionsError: it holds another run; names what differs.
    """
    place.mkdir(parents=True, exist_ok=True)
    file = place / "settings.json"
    if not file.exists():
        write_json(file, settings)
        return
    found = read_json(file, "run settings")
    differ = [name for name in settings if settings[name] != found.get(name)]
    if differ:
        raise OptionsError(
            f"{place} holds another run (it differs in: {', '.join(differ)}); choose another folder or delete that one"
        )


def _measured(place: Path | None, run: Callable[[Path | None], Measurement]) -> Measurement:
    if place is None:
        return run(None)
    file = place / MEASUREMENT_FILE
    if file.exists():
        return Measurement.load(file)
    measurement = run(place / "measurement.part")
    measurement.save(file)
    return measurement


def _solved(place: Path | None, problem: Problem, run: Callable[[], Solution]) -> Solution:
    if place is None:
        return run()
    file = place / "solution.json"
    if file.exists():
        solution = Solution.load(file)
        if solution.problem_fingerprint == problem.fingerprint():
            return solution
    solution = run()
    solution.save(file)
    return solution


def _moved(problem: Problem, solution: Solution, refined: Refined) -> Solution:
    """The solution with the refined choice; its bound is that of the first prediction, as its objective."""
    if not refined.steps:
        return solution
    judged = judge(problem, refined.choice)
    return replace(
        solution,
        choice=judged.choice,
        objective=judged.objective,
        usage=judged.usage,
        gap=relative_gap(judged.objective, solution.bound),
        status=judged.status,
        details={**solution.details, "refined": refined.to_json()},
    )


def _finetuned(
    place: Path | None, original: nn.Module, chosen: nn.Module, run: Callable[[Path | None], nn.Module]
) -> nn.Module:
    if place is None:
        return run(None)
    file, cache = place / MODEL_FILE, place / "finetune.part"
    if file.exists() and not cache.exists():
        finished = load_compressed(file, lambda: copy.deepcopy(original))
        if _to_nearest(finished) == _to_nearest(chosen):
            return finished
    return run(cache)


def _to_nearest(model: nn.Module) -> list[Transform]:
    """How the parts are stored; what was trained is rounded to nearest."""
    record = record_of(model)
    return [own.transform.nearest for own in record.parts] if record else []
