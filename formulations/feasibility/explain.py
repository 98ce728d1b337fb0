"""Why no choice meets the budgets: which of them clash, how near they can be met, and what would be enough.

Costs do not matter here: every answer comes from programs over the uses alone (`formulations.feasibility.least_use`).
What always holds: an upper value is the use of a choice within the budgets held, a lower value is proven, and where
time is up between the two nothing is claimed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from formulations.feasibility.least_use import Least, UsePrograms, limit_of
from formulations.problem import Problem

TIME_LIMIT_S = 20.0
"""Seconds for all programs together."""

PINNED = 5
"""Number of groups that are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReach:
    """How far one budget can be met.

    Attributes:
        asked: the budget.
        alone: the smallest use any choice can have.
        lower: no choice that keeps within all other budgets uses less; None when no choice keeps within them.
        upper: the use of a choice that keeps within all other budgets, ``lower`` but for the solver's tolerance when
            it came to its end; None when no such choice was found. With a budget of this much all hold together.
    """

    name: str
    asked: float
    alone: float
    lower: float | None
    upper: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedGroup:
    """A group that takes much of a clashing budget whatever is chosen."""

    group: str
    num_options: int
    budget: str
    smallest: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """Budgets that all hold together when some are multiplied by a common factor.

    Attributes:
        budgets: those that are multiplied; the others stay.
        factor: a factor that is enough.
        lower: proven: no factor below this is enough.
        usage: the use of a choice that meets the multiplied budgets.
    """

    budgets: tuple[str, ...]
    factor: float
    lower: float
    usage: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasibility:
    """What `explain_infeasibility` finds. ``str`` gives it as a short text.

    Attributes:
        feasible: whether a choice meets all budgets; None when time was up before that was known.
        budgets: every budget by itself and with the others.
        clash: budgets that no choice meets together.
        minimal: whether it is proven that without any one of them the others can be met.
        fixed: what is used of the clashing budgets whatever is chosen.
        pinned: groups with the largest smallest uses of the clashing budgets, largest share first.
        relaxation: the least common factor for the clashing budgets; for all budgets when that cannot be enough;
            None when no factor is (a budget of zero), or none was found in time.
    """

    feasible: bool | None
    budgets: tuple[BudgetReach, ...]
    clash: tuple[str, ...]
    minimal: bool
    fixed: dict[str, float]
    pinned: tuple[PinnedGroup, ...]
    relaxation: Relaxation | None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of everything in here."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines and a table for people."""
        return "\n".join(_lines(self))


def explain_infeasibility(problem: Problem, *, time_limit: float = TIME_LIMIT_S) -> Infeasibility:
    """Explain why the budgets of ``problem`` cannot be met, and what would be enough.

    Args:
        problem: any problem; the answer says so when its budgets can be met.
        time_limit: maximum seconds; the answer then holds what is known.

    >>> uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    >>> why = explain_infeasibility(problem)
    >>> why.clash, why.budgets[0].upper, why.relaxation.factor
    (('bytes', 'seconds'), 16.0, 2.0)
    """
    problem.require_linear_budgets("explain_infeasibility")
    programs = UsePrograms(problem, time.perf_counter() + time_limit)
    names = list(problem.budgets)
    smallest = problem.minimum_usage()
    reaches, verdicts = list[BudgetReach](), set[bool | None]()
    for name in names:
        least = programs.least(name, [held for held in names if held != name])
        lower = None if least.impossible else least.lower
        budget, alone = problem.budgets[name], smallest[name]
        reaches.append(BudgetReach(name=name, asked=budget, alone=alone, lower=lower, upper=least.upper))
        verdicts.add(_verdict(problem, name, least))
    feasible = not names or (True if True in verdicts else False if False in verdicts else None)
    clash, minimal = _clash(problem, programs) if feasible is False else ((), False)
    return Infeasibility(
        feasible=feasible,
        budgets=tuple(reaches),
        clash=clash,
        minimal=minimal,
        fixed={name: problem.fixed[name] for name in clash if name in problem.fixed},
        pinned=_pinned(problem, clash),
        relaxation=_relaxation(problem, programs, clash) if clash else None,
    )


def _verdict(problem: Problem, name: str, least: Least) -> bool | None:
    """Whether a budget can hold together with the others, whose least use of it is given; None when it is not known."""
    limit = limit_of(problem.budgets[name])
    if least.impossible or least.lower > limit:
        return False
    return True if least.upper is not None and least.upper <= limit else None


def _clash(problem: Problem, programs: UsePrograms) -> tuple[tuple[str, ...], bool]:
    """A set of budgets that cannot be met together and of which none can be spared (a deletion filter)."""
    smallest = problem.minimum_usage()
    alone = [name for name, budget in problem.budgets.items() if smallest[name] > limit_of(budget)]
    if alone:
        return (alone[0],), True
    clash, minimal = list(problem.budgets), True
    for name in problem.budgets:
        rest = [budget for budget in clash if budget != name]
        meets = _verdict(problem, rest[0], programs.least(rest[0], rest[1:]))
        if meets is False:
            clash = rest
        minimal &= meets is not None
    return tuple(clash), minimal


def _pinned(problem: Problem, clash: Sequence[str]) -> tuple[PinnedGroup, ...]:
    pinned: list[PinnedGroup] = []
    for name in clash:
        smallest = np.minimum.reduceat(problem.resources[name], problem.group_offsets[:-1])
        pinned += [
            PinnedGroup(
                group=problem.groups[group],
                num_options=len(problem.options[group]),
                budget=name,
                smallest=float(smallest[group]),
                share=float(smallest[group] / problem.minimum_usage()[name]),
            )
            for group in np.argsort(-smallest, kind="stable")[:PINNED].tolist()
            if smallest[group] > 0
        ]
    return tuple(sorted(pinned, key=lambda group: -group.share)[:PINNED])


def _relaxation(problem: Problem, programs: UsePrograms, clash: Sequence[str]) -> Relaxation | None:
    positive = [name for name, budget in problem.budgets.items() if budget > 0]
    for grow in ([name for name in positive if name in clash], positive):
        if not grow:
            continue
        least = programs.factor(grow, [name for name in problem.budgets if name not in grow])
        if least.upper is not None and least.choice is not None:
            usage = problem.usage(least.choice)
            return Relaxation(budgets=tuple(grow), factor=least.upper, lower=least.lower, usage=usage)
    return None


def _lines(why: Infeasibility) -> Iterator[str]:
    clash = ", ".join(why.clash)
    if why.feasible:
        yield "All budgets can be met together."
    elif why.feasible is None:
        yield "Whether the budgets can be met together is not known: the time limit came first."
    elif len(why.clash) == 1:
        yield f"No choice meets the budget for {clash}, whatever the others are."
    else:
        given_up = "; without any one of them the rest can be met" if why.minimal else ""
        yield f"No choice meets the budgets for {clash} together{given_up}."
    table = [("budget", "asked", "smallest alone", "smallest while the others hold")]
    for reach in why.budgets:
        if reach.lower is None:
            together = "the others cannot hold"
        elif reach.upper is None:
            together = f"at least {_amount(reach.lower)}"
        elif _same(reach.lower, reach.upper):
            together = _amount(reach.upper)
        else:
            together = f"between {_amount(reach.lower)} and {_amount(reach.upper)}"
        table.append((reach.name, _amount(reach.asked), _amount(reach.alone), together))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
    if (least := why.relaxation) is not None:
        uses = ", ".join(f"{name} {_amount(use)}" for name, use in least.usage.items())
        so_far = "" if _same(least.lower, least.factor) else f" (the least is not known; at least {least.lower:.6g})"
        yield f"Enough: {', '.join(least.budgets)} times {least.factor:.6g}{so_far}. A choice then uses {uses}."
    elif why.clash:
        yield "No factor was found by which larger budgets could be met."
    for name, use in why.fixed.items():
        yield f"{_amount(use)} {name} are used whatever is chosen."
    for group in why.pinned:
        options = "its only option" if group.num_options == 1 else f"the smallest of {group.num_options} options"
        taken = f"{_amount(group.smallest)} {group.budget} ({group.share:.0%} of the smallest use)"
        yield f"{group.group} takes {taken}: {options}."


def _same(lower: float, upper: float) -> bool:
    return upper - lower <= 1e-5 * abs(upper)


def _amount(value: float) -> str:
    return f"{value:,.10g}"
