"""Proposals: choices made in different ways, from which `qcompress.guard` takes the best.

The solver's choice is optimal for one prediction. Further proposals use other strengths of the pair terms or none, the
same setting for all parts, and the solver's pool; choices with compensated codes are also proposed rounded to nearest.
None of them needs another measurement. `repeated` repeats the way of a proposal with more samples.

Costs at softened outputs need fewer samples. If a network is confident, a few samples make up most of the loss, and
which ones they are depends on the draw. With logits divided by a temperature all samples contribute, while small
changes count as before; large ones are judged by plain costs only. A mean of both is the safest guide.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from qcompress.formulation import at_softened_outputs, at_strength, pair_strength
from qcompress.measurement import Measurement
from qcompress.settings import UNIFORM, settings_of
from solvers import Solution, Solver, solve
from solvers.solution import uninterrupted

ADDITIVE = "additive"
"""Name of the choice without pair terms."""

SOFTENED = "softened outputs"
"""Name of the choice by costs at softened outputs, without pair terms."""

PARTLY_SOFTENED, SHARE = "partly softened outputs", 0.25
"""Name of the choice by a mean of plain and softened costs, without pair terms, and the share of the softened ones."""

CAREFUL = 0.25
"""Strength of the pair terms in the reference."""

STRENGTHS = (0.0, 0.25, 0.5, 1.0)
"""Strengths of the pair terms that proposals are made with."""

SOLVER = "auto"
"""Solver for the further proposals: it runs locally, for any size, and costs nothing."""

SHARE_OF_TIME, UNLIMITED_S = 0.05, 5.0
"""Time for each further proposal: share of the solver's time limit, or seconds if it has none."""

MOST_OF_POOL = 3
"""Maximum number of choices from the solver's pool that are proposed."""

NEAREST, NEAREST_OF_FEW = ", to nearest", ", to nearest where inputs are few"
"""Endings of the names of proposals without compensation."""

SEPARATOR = "; "
"""Separator of the names of equal proposals."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proposal:
    """A choice to try: ``(G,)`` option of each part, and the indices of the parts to round to nearest instead."""

    name: str
    choice: NDArray[np.int64]
    nearest: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return {"name": self.name, "choice": self.choice.tolist(), "nearest": list(self.nearest)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Proposal":
        """Undo `to_json`."""
        choice = np.array(value["choice"], dtype=np.int64)
        return cls(name=value["name"], choice=choice, nearest=tuple(value["nearest"]))


class Way(NamedTuple):
    """A way of choosing: the strength of the pair terms, and the share of costs at softened outputs in the mean."""

    strength: float
    softened: float = 0.0

    def state(self, problem: Problem, measurement: Measurement) -> Problem:
        """Return ``problem``, made from ``measurement``, as this way sees it."""
        if self.softened:
            return at_softened_outputs(problem, measurement, self.strength, share=self.softened)
        return at_strength(problem, measurement, self.strength)


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
    """Yield the solver's choice and others made in different ways, each under its own name.

    Args:
        measurement: the measurement that the problem was made from.
        problem: problem made by `formulate`.
        solution: a solver's solution, with a choice.
        pairs: same as in `formulate`; if False, no proposal uses pair terms.
        solver: solver for the proposals with other strengths.
        time_limit: time limit of the solver that found ``solution``, in seconds; each further proposal gets
            `SHARE_OF_TIME` of it.
        seed: seed for ``solver``.
    """
    assert solution.choice is not None  # noqa: S101
    first, *others = (known := ways(measurement, pairs))
    yield Proposal(name=first, choice=solution.choice)
    for name in others:
        stated = known[name].state(problem, measurement)
        limit = _limit(time_limit)
        found = uninterrupted(solve(stated, solver, time_limit=limit, seed=seed, initial=solution.choice))
        if found.choice is not None:
            yield Proposal(name=name, choice=found.choice)
    yield from uniform_settings(measurement, problem)
    for rank, (pooled, _) in enumerate(solution.pool[1 : 1 + MOST_OF_POOL], start=2):
        yield Proposal(name=f"number {rank} of the solver's pool", choice=np.array(pooled, dtype=np.int64))


def ways(measurement: Measurement, pairs: bool | float) -> dict[str, Way]:
    """Return the ways of choosing by name; the first is the one for ``pairs``."""
    asked = pair_strength(pairs)
    known = {_named(strength): Way(strength) for strength in dict.fromkeys((asked, *(STRENGTHS if asked else ())))}
    if measurement.softened is not None:
        known |= {PARTLY_SOFTENED: Way(0.0, SHARE), SOFTENED: Way(0.0, 1.0)}
        if asked:
            known[f"{PARTLY_SOFTENED}, {_named(CAREFUL)}"] = Way(CAREFUL, SHARE)
            known[f"{SOFTENED}, {_named(asked)}"] = Way(asked, 1.0)
    return known


def repeatable(won: Proposal, measurement: Measurement, pairs: bool | float) -> str | None:
    """Return the name under which `repeated` repeats a proposal, or None if its choice does not follow from costs.

    Of several equal proposals, joined under all their names, it is the reference if it is among them, else the first.
    """
    known = ways(measurement, pairs)
    names = [name for name in won.name.split(SEPARATOR) if _way(name) in known]
    standard = reference(measurement, pairs)
    return standard if standard in names else next(iter(names), None)


def repeated(
    won: Proposal,
    name: str,
    measurement: Measurement,
    problem: Problem,
    *,
    pairs: bool | float = True,
    solver: str | Solver = SOLVER,
    time_limit: float | None = None,
    seed: int = 0,
) -> Proposal:
    """Choose again in the way of ``won`` with other costs; return ``won`` itself if that finds no choice.

    Args:
        won: a proposal.
        name: the name of it to repeat, see `repeatable`.
        measurement: the same options measured on more samples.
        problem: the problem of ``won``; its budgets hold, its costs are replaced.
        pairs: same as in `proposals`.
        solver: same as in `proposals`.
        time_limit: same as in `proposals`.
        seed: same as in `proposals`.
    """
    other = ways(measurement, pairs)[_way(name)].state(problem.derived(cost=measurement.cost), measurement)
    found = uninterrupted(solve(other, solver, time_limit=_limit(time_limit), seed=seed, initial=won.choice))
    if found.choice is None:
        return won
    plain = Proposal(name=_way(name), choice=found.choice)
    return next((item for item in (plain, *rounded_to_nearest(measurement, plain)) if item.name == name), won)


def reference(measurement: Measurement, pairs: bool | float) -> str:
    """Return the name of the proposal that others have to beat.

    It has weak pair terms, unless ``pairs`` is False, and a mean of plain and softened costs, if there are any.
    """
    softened = [] if measurement.softened is None else [PARTLY_SOFTENED]
    return ", ".join([*softened, _named(CAREFUL)] if pair_strength(pairs) else softened or [ADDITIVE])


def _way(name: str) -> str:
    """Return the name of the proposal that was rounded to nearest, or ``name`` itself."""
    return name.removesuffix(NEAREST_OF_FEW).removesuffix(NEAREST)


def _limit(time_limit: float | None) -> float:
    return UNLIMITED_S if time_limit is None else SHARE_OF_TIME * time_limit


def _named(strength: float) -> str:
    return f"pair terms at {strength:g}" if strength else ADDITIVE


def uniform_settings(measurement: Measurement, problem: Problem) -> Iterator[Proposal]:
    """Yield choices with the same setting for all parts.

    These are the feasible setting of least additive loss, the feasible setting with the largest use, and equal shares
    of each budget without pair terms.
    """
    from solvers.baselines import uniform  # here: numba is slow to import

    if fitting := feasible_settings(measurement, problem):
        used = {name: _budget_used(problem, proposal.choice) for name, proposal in fitting.items()}
        yield from {name: fitting[name] for name in (next(iter(fitting)), max(used, key=used.__getitem__))}.values()
    for resource in (name for name in problem.budgets if name not in problem.paired_budgets):
        if (shared := uniform(problem, resource)) is not None:
            yield Proposal(name=f"{UNIFORM}equal shares of {resource}", choice=shared)


def feasible_settings(measurement: Measurement, problem: Problem) -> dict[str, Proposal]:
    """Return every setting that keeps the budgets if all parts have it, by name; the one of least additive loss first.

    A part without the setting takes another one, see `settings_of`.
    """
    choices = settings_of(measurement)
    fitting = {name: choice for name, choice in choices.items() if problem.evaluate(choice).feasible}
    alone = {name: float(problem.cost[problem.flat(choice)].sum()) for name, choice in fitting.items()}
    return {name: Proposal(name=name, choice=fitting[name]) for name in sorted(fitting, key=alone.__getitem__)}


def _budget_used(problem: Problem, choice: NDArray[np.int64]) -> float:
    usage = problem.evaluate(choice).usage
    return max(usage[name] / limit for name, limit in problem.budgets.items())


def rounded_to_nearest(measurement: Measurement, proposal: Proposal) -> Iterator[Proposal]:
    """Yield the choice without compensation, for all parts and for those that saw too few inputs."""
    parts = [
        index
        for index, (options, option) in enumerate(zip(measurement.transforms, proposal.choice.tolist(), strict=False))
        if options[option] != options[option].nearest
    ]
    few = tuple(index for index in parts if has_few_inputs(measurement, index))
    if parts:
        yield Proposal(name=f"{proposal.name}{NEAREST}", choice=proposal.choice, nearest=tuple(parts))
    if few and len(few) < len(parts):
        yield Proposal(name=f"{proposal.name}{NEAREST_OF_FEW}", choice=proposal.choice, nearest=few)


def has_few_inputs(measurement: Measurement, part: int) -> bool:
    """Whether the second moments of a part's input are averaged over fewer inputs than its dimension."""
    path = measurement.parts[part].path
    moments = measurement.moments.get(path)
    return moments is not None and moments.ndim > 1 and measurement.num_inputs.get(path, np.inf) < moments.shape[-1]
