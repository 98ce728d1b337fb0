"""Refine a choice by true loss: measure again around the best choice so far and solve near it, round after round.

A round measures every option again as a change of the best choice (`qcompress.remeasure`) and solves the problem
within a trust region: a maximum number of parts that may change, at first unlimited, then halved down to one. Of all
these choices the one with the least true loss is taken, and the next round starts from it.

Invariant: every round's choice is within the budgets, and its true loss on the data is below that of the previous
round.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from formulations import Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.compressed.apply import as_choice, choice_of, require_same_bytes
from qcompress.errors import OptionsError, ResultNotFiniteError
from qcompress.formulation import formulate
from qcompress.identity import identify, once
from qcompress.measurement import Measurement
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.remeasure import loss_of, require_weights_alone
from qcompress.measuring.streamed.resume_folder import remove_files
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import Loss, LossFunction
from qcompress.model.modes import outside_modes, seeded
from qcompress.model.opened import opened_of
from qcompress.scalars import as_cache_file, as_whole
from qcompress.surroundings import surroundings_of
from qcompress.transforms.own_code import code_of
from solvers import SolverLike, solve
from solvers.run import as_solver
from solvers.solution import uninterrupted
from solvers.validation import require_problem

FILE_KIND = FileKind("qcompress refinement", version=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineStep:
    """One round of refining.

    Attributes:
        changes: number of parts that changed their option.
        predicted: loss of the new choice according to the new measurement.
        loss: true loss of the new choice on the data.
    """

    changes: int
    predicted: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refined:
    """Result of `refine`.

    Attributes:
        choice: ``(G,)`` choice for the problem.
        loss: true loss of ``choice`` on the data.
        loss_before: true loss of the initial choice.
        steps: the rounds that lowered the loss.
        complete: whether the last round found no improvement, so that another one would not either.
    """

    choice: NDArray[np.int64]
    loss: float
    loss_before: float
    steps: tuple[RefineStep, ...]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {**asdict(self), "choice": self.choice.tolist()}

    def save(self, path: AnyPath) -> None:
        """Write everything as JSON, atomically."""
        FILE_KIND.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: AnyPath) -> "Refined":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is incomplete, or of another kind or version.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            return cls.from_json(value)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Refined":
        """Undo `to_json`."""
        return cls(
            choice=np.array(value["choice"], dtype=np.int64),
            loss=value["loss"],
            loss_before=value["loss_before"],
            steps=tuple(RefineStep(**step) for step in value["steps"]),
            complete=value["complete"],
        )


@outside_modes
@seeded
def refine(
    model: nn.Module,
    data: Iterable[Any],
    measurement: Measurement,
    problem: Problem,
    choice: ArrayLike,
    *,
    rounds: int = 2,
    solver: SolverLike = "auto",
    time_limit: float | None = 10,
    seed: int = 0,
    loss: str | LossFunction | Loss | None = None,
    forward: forwards.Forward | None = None,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    on_round: Callable[[RefineStep], None] | None = None,
    memory: int | str | None = None,
) -> Refined:
    """Improve a choice by true loss: measure again around the best choice so far and solve again, round after round.

    A round takes about the time of the first measurement, plus a forward pass over the data for each trust region.

    Args:
        model: the original model; it is not modified.
        data: batches, kept in memory; those of a model in memory with the original's outputs.
        measurement: result of `measure`.
        problem: problem made from ``measurement`` by `formulate`; its budgets hold in all rounds, and so does its use
            of pair terms.
        choice: ``(G,)`` a solver's choice for ``problem``.
        rounds: maximum number of rounds; the first round without improvement is the last.
        solver: name of a solver, a ``solvers.Solver`` or a dimod sampler, for every solve.
        time_limit: seconds for each solve.
        seed: seed for the solver.
        loss: same as in `remeasure`.
        forward: same as in `measure`.
        cache: file that stores the result of every round; the same call resumes from it, also with more rounds.
        on_progress: called after every measured batch.
        on_round: called after every round that lowered the loss.
        memory: same as in `measure`, for an opened model.

    Raises:
        ModelError: same as in `remeasure`.
        OptionsError: same as in `remeasure`; also if ``rounds`` is not a positive integer, ``choice`` exceeds a
            budget, or the cache belongs to another refinement.
        ResultNotFiniteError: outputs or losses of ``choice`` are not finite.
        FileFormatError: the cache is incomplete.

    >>> import torch
    >>> from qcompress import (formulate, measure, prune_quantize, solve)
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    >>> measurement = measure(model, data, prune_quantize(bits=(2, 3, 4), sparsity=(0,)), granularity=4)
    >>> problem = formulate(measurement, {"bytes": 0.35})
    >>> refined = refine(model, data, measurement, problem, solve(problem).choice)
    >>> refined.loss <= refined.loss_before, problem.evaluate(refined.choice).feasible
    (True, True)
    """
    forwards.require_module(model)
    if memory is not None and opened_of(model) is None:
        raise OptionsError("memory= is for models that are read block by block, see open_model()")
    rounds, start = as_whole(rounds, "rounds", least=1), as_choice(choice)
    file, key = as_cache_file(cache), ""
    solver, measured = as_solver(solver), loss_of(measurement, loss)
    require_weights_alone(measurement)
    require_problem(problem, "refine")
    _require_start(measurement, problem, start)
    solver.require_kind(pairs=bool(problem.pairs), paired_budgets=tuple(problem.paired_budgets))
    code = code_of(itertools.chain.from_iterable(measurement.transforms)).digest
    data = list(forwards.checked_data(data))
    calibration = Calibration(model=model, data=data, forward=forward, loss=measured, seed=measurement.seed)
    surroundings = surroundings_of(calibration, measurement, code, memory)
    if file is not None:
        of_solver = once(solver, find=partial(identify, solver)).digest
        solved_by = [problem.fingerprint(), start, solver.name, of_solver, time_limit, seed, measurement.method, code]
        key = identify([solved_by, calibration.digests()]).digest
    part = None if file is None else file.with_name(f"{file.name}.part")
    if file is not None and file.exists():
        best = _load(file, key)
    else:
        (before,) = surroundings.losses([start])
        if not math.isfinite(before):
            raise ResultNotFiniteError("the outputs or losses of the choice to refine are not finite on the data")
        best = Refined(choice=start, loss=before, loss_before=before, steps=(), complete=False)
        if file is not None:
            _save(best, file, key)
    while len(best.steps) < rounds and not best.complete:
        local = surroundings.measured(best.choice, best.loss, part, on_progress)
        nearby = list(_nearby(local, problem, best.choice, solver=solver, time_limit=time_limit, seed=seed))
        losses = surroundings.losses([candidate for _, candidate in nearby]) if nearby else []
        best = _improved(best, [(true, *own) for true, own in zip(losses, nearby, strict=True)])
        if file is not None and part is not None:
            _remove(part)  # the next round measures around another choice
            _save(best, file, key)
        if on_round is not None and not best.complete:
            on_round(best.steps[-1])
    if part is not None:
        _remove(part)
    return best


def _require_start(measurement: Measurement, problem: Problem, start: NDArray[np.int64]) -> None:
    """Check that the choice to refine is one of the problem, which was made from the measurement, within its budgets.

    Raises:
        ModelError: it is not, or the problem was made from another measurement.
        OptionsError: it exceeds a budget.
    """
    choice = choice_of(measurement, start)
    judged = problem.evaluate(start)
    require_same_bytes(measurement, choice, judged.usage, "the problem")
    if not judged.feasible:
        listed = ", ".join(
            f"{name} ({judged.usage[name]:g} of {problem.budgets[name]:g})" for name in judged.violations
        )
        raise OptionsError(f"the choice to refine exceeds the budgets for {listed}: give a choice within them")


def _remove(part: Path) -> None:
    """Remove the file or folder that a measurement would have resumed from."""
    if part.is_dir():
        remove_files(part)
    else:
        part.unlink(missing_ok=True)


def _improved(best: Refined, tried: list[tuple[float, float, NDArray[np.int64]]]) -> Refined:
    """Return the best choice after a round that tried choices of the given true and predicted losses."""
    least, predicted, choice = min(tried, key=lambda item: item[0], default=(best.loss, best.loss, best.choice))
    if least >= best.loss:
        return replace(best, complete=True)
    step = RefineStep(changes=int((choice != best.choice).sum()), predicted=predicted, loss=least)
    return replace(best, choice=choice, loss=least, steps=(*best.steps, step))


def _save(best: Refined, file: Path, key: str) -> None:
    FILE_KIND.write_json(file, {"key": key, **best.to_json()})


def _load(file: Path, key: str) -> Refined:
    value = FILE_KIND.read_json(file)
    if value.get("key") != key:
        raise OptionsError(
            f"{file} holds another refinement (model, data, problem, choice or solver differ); choose another file "
            "or delete it"
        )
    with FILE_KIND.building(file):
        return Refined.from_json(value)


def _nearby(
    local: Measurement, problem: Problem, standing: NDArray[np.int64], **settings: Any
) -> Iterator[tuple[float, NDArray[np.int64]]]:
    """Yield predicted losses and choices for trust regions from all parts down to one."""
    whole, changes = dict.fromkeys(problem.budgets, 1.0), len(local.parts)
    while changes:
        nearby = formulate(local, whole, pairs=bool(problem.pairs), changes=changes)
        nearby = nearby.with_budgets(**problem.budgets)
        solution = uninterrupted(solve(nearby, initial=standing, **settings))
        if solution.choice is None or solution.objective is None or (solution.choice == standing).all():
            return  # smaller trust regions hold nothing better either
        yield solution.objective, solution.choice
        changes = int((solution.choice != standing).sum()) // 2
