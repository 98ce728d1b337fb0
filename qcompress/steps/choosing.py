"""Steps from a measurement to a choice: formulate, minimize, solve, refine by true loss, guard."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from formulations import InfeasibleBudgetError, Problem
from qcompress.budgets import LATENCY, fixed_use, not_lowered, remedy
from qcompress.compressed.apply import NEAREST
from qcompress.engines.in_time import TOLERANCE, Seconds, without_time_budget
from qcompress.errors import ResultNotFiniteError
from qcompress.formulation import formulate
from qcompress.guard import RULE, Guarded, HeldOutLosses, KeptLoss, guard
from qcompress.measurement import Measurement
from qcompress.measuring.removals import on_offer
from qcompress.measuring.replacing import not_replaced
from qcompress.model.opened import opened_of
from qcompress.opened_guard import OpenedKeptLoss
from qcompress.proposals import SOLVER, Proposal, feasible_settings, proposals, reference
from qcompress.refinement import Refined, refine
from qcompress.run_folder import Kept, RunFolder, remove
from qcompress.steps.request import Request, identity_of
from solvers import NoChoiceError, Solution, Solver, StopReason, judge, solve
from solvers.base import relative_gap
from solvers.composites.tied import TiedSolver
from solvers.run import as_solver
from solvers.smallest_use import SmallestUse, smallest_use
from solvers.solution import uninterrupted

Found = TypeVar("Found", Solution, SmallestUse)

REFINED = "refined"
"""Name of the refined choice among the guard's proposals."""


def formulate_problem(request: Request, run: RunFolder, measurement: Measurement, *, timed: bool = False) -> Problem:
    """Return the problem to solve.

    Args:
        request: settings of the run.
        run: its folder.
        measurement: source of the problem.
        timed: whether whole choices are timed, so that a time budget may be met although no prediction meets it.

    Raises:
        InfeasibleBudgetError: no choice is within the budgets.
    """
    problem = formulate(measurement, request.budget, pairs=request.pairs)
    try:
        (without_time_budget(problem) if timed else problem).require_reachable_budgets()
    except InfeasibleBudgetError as error:
        hint = remedy(problem, request.budget, measurement.original)
        hint += fixed_use(problem, measurement, measurement.kept) + not_lowered(problem, measurement, measurement.kept)
        hint += not_replaced(measurement, hint) + _channels_that_stay(request, measurement)
        error.args = (f"{error}{hint}",)
        raise
    run.save("problem.npz", problem.save)
    return problem


def _channels_that_stay(request: Request, measurement: Measurement, most: int = 5) -> str:
    """Name the layers whose channels stay, and why; empty if no channels are on offer, or all are."""
    if not measurement.sets:
        return ""
    kept = {item.name: item.reason for item in measurement.skipped}
    if request.measurement is None:
        calibration = request.calibration
        _, kept = on_offer(request.copied, calibration.data, calibration.forward, request.offered)
    if not kept:
        return ""
    named = "; ".join(f"{name}: {reason}" for name, reason in list(kept.items())[:most])
    more = f"; and {len(kept) - most} more" if len(kept) > most else ""
    return f". The channels of some layers stay ({named}{more})"


def unless_interrupted(find: Callable[[], Found]) -> Callable[[Path | None], Found]:
    """Return the argument of `RunFolder.once` whose step stays unfinished if Ctrl-C ended ``find`` early."""

    def make(part: Path | None) -> Found:
        found = find()
        if part is not None:
            remove(part)
            if found.stop_reason is StopReason.INTERRUPTED:
                part.touch()
        return found

    return make


def minimize_use(request: Request, run: RunFolder, problem: Problem) -> SmallestUse | None:
    """Find the smallest use of the resource to minimize, if there is one.

    Raises:
        InfeasibleBudgetError: no choice has a predicted loss within the limit.
        NoChoiceError: the solver found none, and did not prove that there is none.
    """
    resource, limit = request.minimize, request.loss_limit
    if resource is None or limit is None:
        return None
    return run.once(
        "minimize",
        unless_interrupted(
            lambda: smallest_use(
                problem,
                resource,
                limit,
                solver=request.solver,
                time_limit=request.time_limit,
                seed=request.calibration.seed,
                on_progress=run.watched(request.on_progress),
            )
        ),
        key={"problem": problem.fingerprint(), "resource": resource, "loss": limit, **request.solved_by()},
        kept=Kept("smallest.json", SmallestUse.save, SmallestUse.load),
    )


def with_smallest_use(run: RunFolder, problem: Problem, smallest: SmallestUse | None) -> Problem:
    """Return the problem with the smallest use as a budget."""
    if smallest is None:
        return problem
    problem = problem.with_budgets(**{smallest.resource: smallest.usage})
    run.save("problem.npz", problem.save)
    return problem


def solve_problem(request: Request, run: RunFolder, problem: Problem, smallest: SmallestUse | None) -> Solution:
    """Return the solver's choice, at least as good as the one with the smallest use.

    Raises:
        NoChoiceError: the solver found no choice.
        KeyboardInterrupt: Ctrl-C ended it before it found one.
    """
    solution = run.once(
        "solve",
        unless_interrupted(
            lambda: solve(
                problem,
                request.solver,
                time_limit=request.time_limit,
                seed=request.calibration.seed,
                initial=None if smallest is None else smallest.choice,
                on_progress=run.watched(request.on_progress),
            )
        ),
        key={
            "problem": problem.fingerprint(),
            "initial": None if smallest is None else smallest.choice,
            **request.solved_by(),
        },
        kept=Kept("solved.json", Solution.save, Solution.load),
    )
    if solution.choice is None:
        uninterrupted(solution)
        error = NoChoiceError(
            f"solver {solution.solver!r} found no choice within the budgets {dict(problem.budgets)} "
            f"(status {solution.status}); allow more time or raise a budget"
        )
        error.problem = problem
        raise error
    return solution


def refine_choice(
    request: Request, run: RunFolder, measurement: Measurement, problem: Problem, solution: Solution
) -> Refined | None:
    """Refine the choice by true loss, if rounds are requested; None also if its outputs are not finite."""
    if request.refine_rounds == 0:
        return None
    calibration, choice = request.calibration, solution.choice
    assert choice is not None  # noqa: S101

    def make(cache: Path | None) -> Refined:
        better = refine(
            request.copied,
            calibration.data,
            measurement,
            problem,
            choice,
            rounds=request.refine_rounds,
            solver=request.solver,
            time_limit=request.time_limit,
            seed=calibration.seed,
            loss=calibration.loss,
            forward=calibration.forward,
            cache=cache,
            on_progress=run.watched(request.on_measure),
            on_round=request.on_round,
            memory=request.memory,
        )
        if cache is not None:
            cache.unlink(missing_ok=True)
        return better

    key = {
        **request.judged_by(),
        "problem": problem.fingerprint(),
        "choice": choice,
        "rounds": request.refine_rounds,
    }
    try:
        return run.once("refine", make, key=key, kept=Kept("refined.json", Refined.save, Refined.load))
    except ResultNotFiniteError:  # the guard may find another choice
        return None


def with_refined_choice(problem: Problem, solution: Solution, better: Refined | None) -> Solution:
    """Return the solution with the refined choice; objective and bound are those of the first prediction."""
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


def guard_choice(
    request: Request,
    run: RunFolder,
    measurement: Measurement,
    problem: Problem,
    solution: Solution,
    better: Refined | None,
    *,
    stated: Problem,
    seconds: Seconds | None,
) -> Guarded | None:
    """Evaluate this and other choices on the held-out samples, if there are any.

    Args:
        request: settings of the run.
        run: its folder.
        measurement: source of the problem.
        problem: the problem with the requested budgets.
        solution: the first choice to evaluate.
        better: the refined choice, if rounds were requested.
        stated: the problem with the budgets that choices are solved for, so that they are in time.
        seconds: times whole choices if the budget limits seconds; slower choices are dropped.
    """
    calibration, batches = request.calibration, request.batch_norm_data
    if not (request.guard and any(True for _ in request.kept)):
        return None

    def make(_: Path | None) -> Guarded:
        within, base = _worth_seeing(request, measurement, problem, solution, better, stated, seconds)
        judged_by = problem if seconds is None else without_time_budget(problem)  # those within are in time
        seen: Callable[[Proposal], HeldOutLosses]
        finite: dict[str, Callable[[Proposal], bool]] = {}
        if opened_of(calibration.model) is None:
            seen = KeptLoss(
                request.copied,
                measurement,
                request.kept,
                data=calibration.data,
                loss=calibration.loss,
                forward=calibration.forward,
                batch_norm_data=batches,
                original=calibration.original,
                rounding=None if request.engine is None else request.engine.rounding,
            )
            finite = {"is_finite": seen.is_finite}
        else:
            seen = OpenedKeptLoss(
                calibration.model, measurement, request.kept, calibration.data, loss=calibration.loss,
                forward=calibration.forward,
                first=[proposal for proposal in within if judged_by.evaluate(proposal.choice).feasible],
                on_encode=run.watched(request.on_encode),
            )  # fmt: skip
        return guard(measurement, judged_by, within, seen, base=base, timed=seconds is not None, **finite)

    statistics = {} if run.path is None else {"batch_norm_data": identity_of(batches, "batch_norm_data")}
    key = {
        **request.judged_by(),
        **statistics,
        "problem": problem.fingerprint(),
        "loss limit": request.loss_limit,
        "choice": solution.choice,
        "refined": () if better is None else better.choice,
        "pairs": request.pairs,
        "stated": stated.fingerprint(),
        "rule": RULE,
    }
    return run.once("guard", make, key=key, kept=Kept("guard.json", Guarded.save, Guarded.load))


def local_solver(request: Request, measurement: Measurement) -> str | Solver:
    """Return the solver for proposals, which respects the engine's ties."""
    ties = _ties(request, measurement)
    return TiedSolver(as_solver(SOLVER), tied=ties) if ties else SOLVER


def _ties(request: Request, measurement: Measurement) -> Sequence[tuple[str, ...]]:
    return () if request.engine is None else request.engine.ties(measurement.parts)


def _worth_seeing(
    request: Request,
    measurement: Measurement,
    problem: Problem,
    solution: Solution,
    better: Refined | None,
    stated: Problem,
    seconds: Seconds | None,
) -> tuple[list[Proposal], str]:
    """Return the proposals that may be taken, and the name of the reference to beat; see `guard_choice`.

    With a time budget, that is the uniform setting in time with the least predicted loss: a mixture costs conversions.
    Uniform settings are timed whatever their predicted time, as the measured one decides.
    """
    refined = () if better is None or not better.steps else (Proposal(name=REFINED, choice=better.choice),)
    base = REFINED if refined else reference(measurement, request.pairs)
    alike = {} if seconds is None else _settings_worth_timing(measurement, problem)
    ties = _ties(request, measurement)
    within = [
        proposal
        for proposal in (*refined, *_tried(request, measurement, solution, stated), *alike.values())
        if _may_be_taken(proposal, problem, request.loss_limit, ties)
    ]
    if seconds is not None:
        within = _in_time(within, problem, seconds)
        names = {proposal.name for proposal in within}
        base = base if refined else next((name for name in alike if name in names), base)
    return within, base


def _tried(request: Request, measurement: Measurement, solution: Solution, stated: Problem) -> Iterator[Proposal]:
    """Yield the proposals for the problem with stated budgets."""
    yield from proposals(
        measurement,
        stated,
        solution,
        pairs=request.pairs,
        solver=local_solver(request, measurement),
        time_limit=request.time_limit,
        seed=request.calibration.seed,
    )


def _settings_worth_timing(measurement: Measurement, problem: Problem) -> dict[str, Proposal]:
    """Return uniform settings by increasing predicted loss, each predicted to be faster than all before it.

    They keep all budgets except that for time, which is not yet measured.
    """
    settings: dict[str, Proposal] = {}
    least = np.inf
    for name, proposal in feasible_settings(measurement, without_time_budget(problem)).items():
        seconds = problem.evaluate(proposal.choice).usage[LATENCY]
        if seconds < least:
            settings[name], least = proposal, seconds
    return settings


def _in_time(proposals: Sequence[Proposal], problem: Problem, seconds: Seconds) -> list[Proposal]:
    """Return the proposals whose models keep the time budget, all timed together; failing that, the fastest."""
    choices = {proposal.choice.tobytes(): proposal.choice for proposal in proposals}
    taken = dict(zip(choices, seconds(list(choices.values())), strict=True))
    limit = max((1 + TOLERANCE) * problem.budgets[LATENCY], min(taken.values()))
    return [proposal for proposal in proposals if taken[proposal.choice.tobytes()] <= limit]


def _may_be_taken(
    proposal: Proposal, problem: Problem, loss_limit: float | None, ties: Sequence[Sequence[str]]
) -> bool:
    """Whether a choice respects the engine's ties and the limit on the predicted loss, if any."""
    options = dict(zip(problem.groups, proposal.choice.tolist(), strict=True))
    tied = all(len({options[name] for name in names}) == 1 for names in ties)
    return tied and (loss_limit is None or problem.evaluate(proposal.choice).objective <= loss_limit)


def with_final_choice(problem: Problem, solution: Solution, best: Proposal | None, run: RunFolder) -> Solution:
    """Return and save the solution with the final choice.

    It keeps the bound of the solver's problem, except if only its measured time keeps the budget: the bound holds for
    choices whose predicted time does.
    """
    if best is not None and (best.nearest or (best.choice != solution.choice).any()):
        judged = judge(problem, best.choice)
        if judged.choice is None and LATENCY in problem.budgets:
            judged, solution = judge(without_time_budget(problem), best.choice), replace(solution, bound=None)
        solution = replace(
            solution,
            choice=judged.choice,
            objective=judged.objective,
            usage=judged.usage,
            gap=relative_gap(judged.objective, solution.bound),
            status=judged.status,
            details={**solution.details, "guard": best.name, NEAREST: list(best.nearest)},
        )
    run.save("solution.json", solution.save)
    return solution
