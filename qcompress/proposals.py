"""Choices worth trying, each made in another way, for `qcompress.guard` to find the best of them.

The solver's choice is the best by one prediction. Others are made with the terms between parts at other strengths and
without them, by the same setting for all parts, and from the solver's pool; compensated codes have rounding to nearest
beside them. None of them costs a measurement.

Costs at softened outputs need fewer samples: where a network is sure of itself, a few samples make up most of a loss,
and which ones differs from draw to draw; divided by a temperature all samples count, and small changes count as before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from qcompress.formulation import at_softened_outputs, at_strength, pair_strength
from qcompress.measurement import Measurement
from solvers import Solution, Solver, solve

ADDITIVE = "additive"
"""Name of the choice without terms between parts."""

SOFTENED = "softened outputs"
"""Name of the choice by the costs at outputs that are less sure, without terms between parts."""

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
"""Of the terms between parts, that choices are made with."""

SOLVER = "auto"
"""Makes the other choices: of any size, here, and nothing that is paid for."""

SHARE_OF_TIME, UNLIMITED_S = 0.05, 5.0
"""Of the solver's time limit, for each of them; seconds for each where it has none."""

MOST_OF_POOL = 3
"""Choices of the solver's pool that are tried at most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proposal:
    """A choice to try: ``(G,)`` local options, and the indices of the parts that are rounded to nearest instead."""

    name: str
    choice: NDArray[np.int64]
    nearest: tuple[int, ...] = ()


def proposals(
    measurement: Measurement,
    problem: Problem,
    solution: Solution,
    *,
    pairs: bool | float = True,
    solver: str | Solver = SOLVER,
    time_limit: float | None = None,
    seed: int = 0,
) -> Iterator[Proposal]:
    """The solver's choice, and others made in other ways, each under its own name.

    Args:
        measurement: what the problem was made from.
        problem: as `formulate` made it.
        solution: a solver's, with a choice.
        pairs: as of `formulate`; without them no choice is made with them.
        solver: makes the choices with the terms at other strengths.
        time_limit: that of ``solution``'s solver, in seconds; `SHARE_OF_TIME` of it goes into each of these choices.
        seed: of their solver.
    """
    assert solution.choice is not None  # noqa: S101
    asked = pair_strength(pairs)
    yield Proposal(name=_named(asked), choice=solution.choice)
    limit = UNLIMITED_S if time_limit is None else SHARE_OF_TIME * time_limit
    others = {
        _named(strength): at_strength(problem, measurement, strength)
        for strength in STRENGTHS
        if asked and strength != asked
    }
    if measurement.softened is not None:
        others[SOFTENED] = at_softened_outputs(problem, measurement, 0.0)
        if asked:
            others[f"{SOFTENED}, {_named(asked)}"] = at_softened_outputs(problem, measurement, asked)
    for name, other in others.items():
        choice = solve(other, solver, time_limit=limit, seed=seed).choice
        if choice is not None:
            yield Proposal(name=name, choice=choice)
    yield from uniform_settings(measurement, problem)
    for rank, (pooled, _) in enumerate(solution.pool[1 : 1 + MOST_OF_POOL], start=2):
        yield Proposal(name=f"number {rank} of the solver's pool", choice=np.array(pooled, dtype=np.int64))


def _named(strength: float) -> str:
    return f"pair terms at {strength:g}" if strength else ADDITIVE


def uniform_settings(measurement: Measurement, problem: Problem) -> Iterator[Proposal]:
    """The same for all parts: of the settings that fit the one of least additive loss and the largest; equal shares.

    A part that does not have the setting takes what it is rounded to nearest, else it stays as it is.
    """
    from solvers.baselines import uniform  # here: numba is slow to import

    exact: list[dict[str, int]] = []
    close: list[dict[str, int]] = []
    for options in measurement.transforms:
        exact.append({transform.label: index for index, transform in reversed(list(enumerate(options)))})
        close.append({transform.nearest.label: index for index, transform in reversed(list(enumerate(options)))})
    nearest = {option.label: option.nearest.label for options in measurement.transforms for option in options}
    fitting = {}
    for label, rounded in nearest.items():
        choice = np.array(
            [numbers.get(label, other.get(rounded, 0)) for numbers, other in zip(exact, close, strict=True)]
        )
        if problem.evaluate(choice).feasible:
            fitting[label] = choice
    if fitting:
        alone = {label: problem.cost[problem.flat(choice)].sum() for label, choice in fitting.items()}
        used = {label: _budget_used(problem, choice) for label, choice in fitting.items()}
        for label in dict.fromkeys([min(alone, key=alone.__getitem__), max(used, key=used.__getitem__)]):
            yield Proposal(name=f"uniform: {label}", choice=fitting[label])
    for resource in problem.budgets:
        if (shared := uniform(problem, resource)) is not None:
            yield Proposal(name=f"uniform: equal shares of {resource}", choice=shared)


def _budget_used(problem: Problem, choice: NDArray[np.int64]) -> float:
    usage = problem.evaluate(choice).usage
    return max(usage[name] / limit for name, limit in problem.budgets.items())


def rounded_to_nearest(measurement: Measurement, proposal: Proposal) -> Iterator[Proposal]:
    """The same choice without compensation, everywhere and where a layer saw fewer inputs than it has."""
    parts = [
        index
        for index, (options, option) in enumerate(zip(measurement.transforms, proposal.choice.tolist(), strict=False))
        if options[option] != options[option].nearest
    ]
    few = tuple(index for index in parts if has_few_inputs(measurement, index))
    if parts:
        yield Proposal(name=f"{proposal.name}, to nearest", choice=proposal.choice, nearest=tuple(parts))
    if few and len(few) < len(parts):
        name = f"{proposal.name}, to nearest where inputs are few"
        yield Proposal(name=name, choice=proposal.choice, nearest=few)


def has_few_inputs(measurement: Measurement, part: int) -> bool:
    """Whether the moments of a part's inputs are the mean of fewer inputs than an input has numbers."""
    path = measurement.parts[part].path
    moments = measurement.moments.get(path)
    return moments is not None and moments.ndim > 1 and measurement.num_inputs.get(path, np.inf) < moments.shape[-1]
