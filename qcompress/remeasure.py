"""Measure the same options again from where a choice stands, and choose again: `remeasure` and `refine`.

What an option does to the loss is known best near the model that it was measured on. Where a choice changes many parts
by much, its loss is not the predicted one, and a solver finds just those choices for which the prediction is too good.
So the choice is put into the model and every option is measured anew as a change of that model, with losses still
relative to the original's outputs. The problem is then solved again within a trust region: a number of parts that may
change, from as many as the solver likes, halved down to one. Of all these choices the one of least true loss is taken,
and the next round starts there.

What always holds: a round's choice is within the budgets and its true loss on the data is below that of the round
before.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from formulations import Problem
from formulations.files import AnyPath
from qcompress import forward as forwards
from qcompress.emulation import Emulation
from qcompress.errors import OptionsError
from qcompress.formulate import formulate
from qcompress.losses import Loss, LossFunction, as_loss
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.run import MeasureProgress, accumulate
from qcompress.true_loss import TrueLoss, mean_loss
from solvers import solve


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineStep:
    """One round.

    Attributes:
        changes: parts that took another option.
        predicted: loss of the new choice by the new measurement.
        loss: its true loss on the data.
    """

    changes: int
    predicted: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """What `refine` found.

    Attributes:
        choice: ``(G,)`` of the problem.
        loss: its true loss on the data.
        loss_before: that of the choice it began with.
        steps: the rounds that brought something.
    """

    choice: NDArray[np.int64]
    loss: float
    loss_before: float
    steps: tuple[RefineStep, ...]


def remeasure(
    model: nn.Module,
    data: Iterable[Any],
    measurement: Measurement,
    choice: ArrayLike,
    *,
    loss: str | LossFunction | None = None,
    forward: forwards.Forward | None = None,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Measurement:
    """The options of a measurement, measured again as changes of the model with ``choice`` in its weights.

    Args:
        model: the original; left as it is.
        data: re-iterable batches.
        measurement: what `measure` gave.
        choice: ``(G,)`` of a problem made from it.
        loss: the callable that was measured by; ``"kl"`` and ``"mse"`` are known from the measurement.
        forward: as of `measure`.
        cache: as of `measure`.
        on_progress: as of `measure`.

    Returns:
        A measurement whose costs are increases from ``standing_loss``, the loss of ``choice``: `formulate` and `apply`
        take it as any other.

    Raises:
        ModelError: another model than measured, or no choice for it.
        OptionsError: another loss than measured.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    >>> measurement = measure(model, data, prune_quantize(bits=(2, 4), sparsity=(0,)))
    >>> again = remeasure(model, data, measurement, [1, 2])
    >>> again.standing, again.cost[[1, 5]].tolist()
    ((1, 2), [0.0, 0.0])
    """
    emulation, measured = Emulation(model, measurement), _loss_of(measurement, loss)
    emulation.put(choice)
    return _measured_at(
        model, forwards.checked_data(data), measurement, emulation, measured, forward, cache, on_progress
    )


def refine(
    model: nn.Module,
    data: Iterable[Any],
    measurement: Measurement,
    problem: Problem,
    choice: ArrayLike,
    *,
    rounds: int = 2,
    solver: Any = "auto",
    time_limit: float | None = 10,
    seed: int = 0,
    loss: str | LossFunction | None = None,
    forward: forwards.Forward | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    on_round: Callable[[RefineStep], None] | None = None,
) -> Refined:
    """Better choices by true loss: measured again around the best one so far and solved again, round after round.

    A round takes about the time of the first measurement, and a forward pass over the data for each trust region.

    Args:
        model: the original; left as it is.
        data: batches, kept in memory with the original's outputs.
        measurement: what `measure` gave.
        problem: made from it by `formulate`; its budgets and its pair terms (or their absence) hold for all rounds.
        choice: ``(G,)`` a solver's answer to it.
        rounds: at most; the first that brings nothing is the last.
        solver: of every solve.
        time_limit: seconds for each.
        seed: of the solver.
        loss: as of `remeasure`.
        forward: as of `measure`.
        on_progress: called after every measured batch.
        on_round: called after every round that brought something.

    Raises:
        ModelError, OptionsError: as `remeasure`.

    >>> import torch
    >>> from qcompress import formulate, measure, prune_quantize, solve
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    >>> measurement = measure(model, data, prune_quantize(bits=(2, 3, 4), sparsity=(0,)), granularity=4)
    >>> problem = formulate(measurement, {"bytes": 0.35})
    >>> refined = refine(model, data, measurement, problem, solve(problem).choice)
    >>> refined.loss <= refined.loss_before, problem.evaluate(refined.choice).feasible
    (True, True)
    """
    if not (isinstance(rounds, int) and rounds >= 1):
        raise OptionsError(f"rounds must be a whole number from 1, found {rounds!r}")
    measured = _loss_of(measurement, loss)
    true_loss = TrueLoss(model, measurement, data, loss=measured, forward=forward)
    best = np.asarray(choice, dtype=np.int64)
    least = before = true_loss(best)
    steps = []
    for _ in range(rounds):
        true_loss.emulation.put(best)
        local = _measured_at(
            model, true_loss.data, measurement, true_loss.emulation, measured, forward, None, on_progress
        )
        found = {
            one.tobytes(): (true_loss(one), predicted, one)
            for predicted, one in _nearby(local, problem, best, solver=solver, time_limit=time_limit, seed=seed)
        }
        new_loss, predicted, new = min(found.values(), key=lambda one: one[0], default=(least, least, best))
        if not new_loss < least:
            break
        steps.append(RefineStep(changes=int((new != best).sum()), predicted=predicted, loss=new_loss))
        least, best = new_loss, new
        if on_round is not None:
            on_round(steps[-1])
    return Refined(choice=best, loss=least, loss_before=before, steps=tuple(steps))


def _nearby(
    local: Measurement, problem: Problem, standing: NDArray[np.int64], **settings: Any
) -> Iterator[tuple[float, NDArray[np.int64]]]:
    """Predicted losses and choices for trust regions from everything down to one part."""
    whole, changes = dict.fromkeys(problem.budgets, 1.0), len(local.parts)
    while changes:
        nearby = formulate(local, whole, pairs=problem.pairs is not None, changes=changes)
        nearby = nearby.with_budgets(**problem.budgets)
        solution = solve(nearby, initial=standing, **settings)
        if solution.choice is None or solution.objective is None or (solution.choice == standing).all():
            return  # where nothing near is better, nothing nearer is
        yield solution.objective, solution.choice
        changes = int((solution.choice != standing).sum()) // 2


def _measured_at(
    model: nn.Module,
    batches: Iterable[Any],
    measurement: Measurement,
    emulation: Emulation,
    loss: Loss,
    forward: forwards.Forward | None,
    cache: AnyPath | None,
    on_progress: Callable[[MeasureProgress], None] | None,
) -> Measurement:
    """`measurement` anew, as changes of the emulation's model."""
    standing = tuple(emulation.choice)
    candidates = Candidates(emulation.model, measurement.parts, measurement.transforms, emulation.rows, standing)
    settings = [measurement.model_fingerprint, measurement.method, loss.name, measurement.seed, standing]
    with forwards.evaluating(model), forwards.evaluating(emulation.model):
        sums = accumulate(
            emulation.model,
            batches,
            candidates,
            loss,
            measurement.method,
            measurement.seed,
            forward,
            settings,
            original=model,
            cache=cache,
            on_progress=on_progress,
        )
    return dataclasses.replace(
        measurement,
        cost=sums.mean_cost(),
        factor=sums.factor(),
        num_samples=sums.num_samples,
        standing=standing,
        standing_loss=mean_loss(model, emulation.model, batches, loss=loss, forward=forward),
    )


def _loss_of(measurement: Measurement, loss: str | LossFunction | None) -> Loss:
    """The loss that was measured by.

    Raises:
        OptionsError: it is a callable that was not given, or another one.
    """
    if loss is None and measurement.loss not in ("kl", "mse"):
        raise OptionsError(f"the measurement was made with the loss {measurement.loss!r}: give that callable as loss=")
    found = as_loss(measurement.loss if loss is None else loss)
    if found.name != measurement.loss:
        raise OptionsError(f"the measurement was made with the loss {measurement.loss!r}, found {found.name!r}")
    return found
