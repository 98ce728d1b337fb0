"""Removal of channels in rounds: remove a part, fit the rest, measure again.

What a channel is worth depends on the others. The first run chooses everything at once. Then the budgets are approached
in equal ratios: every round removes channels of the network that the round before left, judged by their loss against
the original, and fits the rest. If codes are on offer as well, they are chosen in the last round, on a network that
already has the macs of the channels that the first run chose. The result is the last round's, unless the first run
loses less on the held-out samples, or a round finds nothing to remove.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import nn

from formulations import InfeasibleBudgetError, Problem
from qcompress.budgets import Amount, Limit
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import save_compressed
from qcompress.errors import NoChannelsError
from qcompress.guard import Candidate
from qcompress.measurement import Measurement
from qcompress.measuring.codes_beside import CODES
from qcompress.options import Options
from qcompress.report import Report
from qcompress.run_folder import RunFolder
from qcompress.steps.reporting import write_text
from qcompress.steps.request import MEASUREMENT_FILE, MODEL_FILE, Request
from qcompress.transforms.channels import Jointly, KeepChannels
from solvers import NoChoiceError, Solution

START = "all at once"
"""Name of the run that chooses everything at once."""


class Made(Protocol):
    """What a run of all steps returns (`qcompress.Result`)."""

    @property
    def model(self) -> nn.Module:
        """The smaller network."""

    @property
    def measurement(self) -> Measurement:
        """The measurement of the choice."""

    @property
    def problem(self) -> Problem:
        """The problem that was solved."""

    @property
    def solution(self) -> Solution:
        """The choice."""

    @property
    def report(self) -> Report:
        """Its figures."""


AnyMade = TypeVar("AnyMade", bound=Made)


def compress_in_rounds(
    request: Request,
    run: RunFolder,
    compressed: Callable[[Request, RunFolder], AnyMade],
    reported: Callable[[AnyMade, Report], AnyMade],
) -> AnyMade:
    """Run all at once, then in rounds, and return the better of both.

    Args:
        request: the request, with more than one round.
        run: folder of the run; every round has its own folder in it.
        compressed: function that runs all steps.
        reported: function that returns a result with another report.
    """
    start = compressed(request, _folder(run, START))
    parts = _partial_budgets(request, start)
    if not parts:
        return _kept(run, reported(start, replace(start.report, rounds=(_figures(START, start.report),))))
    model, figures, last = request.calibration.model, [_figures(START, start.report)], start
    for number, amounts in enumerate([*parts, start.report.budgets], start=1):
        budget = {name: Limit(amount, is_share=False) for name, amount in amounts.items()}
        name = f"round {number}"
        asked = _round(request, model, start.report.original, budget, number, final=number == request.rounds)
        try:
            last = compressed(asked, _folder(run, name))
        except (NoChannelsError, NoChoiceError, InfeasibleBudgetError) as error:
            why = f"{name} was not possible, so the choice of everything at once is returned: {error}"
            report = replace(start.report, rounds=tuple(figures), warnings=(*start.report.warnings, why))
            return _kept(run, reported(start, report))
        model = last.model
        figures.append(_figures(name, last.report))
    best = last if _loss(last.report) < _loss(start.report) else start
    report = replace(best.report, rounds=tuple(figures))
    return _kept(run, reported(best, report))


def _partial_budgets(request: Request, start: Made) -> list[dict[str, float]]:
    """Return the budgets of all rounds but the last, as amounts in equal ratios between the original and the budgets.

    Where codes are on offer, the rounds before the last remove channels until the macs are those of the channels that
    the first run chose.
    """
    original, steps = start.report.original, request.rounds
    goal = dict(start.report.budgets)
    if _offers_codes(request):
        goal, steps = {"macs": _macs_of_channels(start)}, request.rounds - 1
    ratios = {name: limit / original[name] for name, limit in goal.items()}
    if min(ratios.values()) >= 1:
        return []
    return [
        {name: original[name] * min(ratio, 1.0) ** (number / steps) for name, ratio in ratios.items()}
        for number in range(1, request.rounds)
    ]


def _macs_of_channels(start: Made) -> float:
    """Return the macs of a choice with its channels and without its codes: factors in place of layers save macs too."""
    assert start.solution.choice is not None  # noqa: S101
    measurement, dense = start.measurement, []
    for place, (options, option) in enumerate(zip(measurement.transforms, start.solution.choice.tolist(), strict=True)):
        chosen = options[option] if place < len(measurement.sets) else options[0]
        dense.append(options.index(chosen.removal if isinstance(chosen, Jointly) else chosen))
    return start.problem.evaluate(dense).usage["macs"]


def _round(
    request: Request,
    model: nn.Module,
    original_use: Mapping[str, float],
    budget: Mapping[str, Amount],
    number: int,
    *,
    final: bool,
) -> Request:
    """Return the request of one round, which starts from ``model``."""
    calibration = replace(request.calibration, model=model, original=request.calibration.model)
    steps = request.finetune_steps * number // request.rounds - request.finetune_steps * (number - 1) // request.rounds
    identities = request.identities
    if identities:
        identities = {**identities, **calibration.identities()}
    return replace(
        request,
        model=model,
        calibration=calibration,
        copied=own_copy(model),
        budget=budget,
        offered=request.offered if final else _channels_only(request),
        identities=identities,
        measurement=None,
        finetune_steps=steps,
        evaluate=request.evaluate if final else None,
        original_use=original_use,
    )


def _offers_codes(request: Request) -> bool:
    offers = [offer for options in request.offered.by_pattern.values() for offer in options.offers]
    return any(isinstance(offer, CODES) for offer in offers)


def _channels_only(request: Request) -> Any:
    by_pattern = {
        pattern: Options(tuple(offer for offer in options.offers if isinstance(offer, KeepChannels)))
        for pattern, options in request.offered.by_pattern.items()
    }
    return replace(request.offered, by_pattern=by_pattern)


def _loss(report: Report) -> float:
    """Return the loss on held-out samples, or on the calibration data if there are none."""
    if report.loss_validation is not None:
        return report.loss_validation
    return report.loss_measured if report.loss_finetuned is None else report.loss_finetuned


def _figures(name: str, report: Report) -> Candidate:
    return Candidate(name, report.loss_predicted, _loss(report), report.usage)


def _folder(run: RunFolder, name: str) -> RunFolder:
    return RunFolder(None if run.path is None else run.path / name.replace(" ", "_"))


def _kept(run: RunFolder, made: AnyMade) -> AnyMade:
    """Write the result into the run's folder, in place of that of an earlier run."""
    run.discard("agreement.json")
    run.save("report.json", made.report.save)
    run.save("summary.md", partial(write_text, made.report.to_markdown()))
    run.save(MODEL_FILE, partial(save_compressed, made.model))
    run.save(MEASUREMENT_FILE, made.measurement.save)
    run.save("problem.npz", made.problem.save)
    run.save("solution.json", made.solution.save)
    return made
