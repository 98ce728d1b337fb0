"""Explain why no choice meets the budgets: which of them conflict, how closely they can be met, what would suffice.

Costs play no role: every answer comes from integer programs over the uses alone
(`formulations.feasibility.least_use`). Upper values are uses of actual choices that meet the other budgets, and lower
values are proven. If the time runs out while the two differ, nothing is claimed about the values between them.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from formulations.feasibility.least_use import Least, UsePrograms
from formulations.problem import Problem, limit_of

TIME_LIMIT_S = 20.0
"""Default time limit in seconds, for all programs together."""

PINNED = 5
"""Maximum number of groups listed in ``pinned``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetReach:
    """How closely one budget can be met.

    Attributes:
        name: name of the resource.
        asked: the budget.
        alone: the smallest use any choice can have.
        lower: proven lower bound on the use by choices that meet all other budgets; None when no choice meets them.
        upper: use by the best choice found that meets all other budgets; None when none was found. It equals
            ``lower`` up to the solver's tolerance if the solver finished. With this budget all budgets can be met.
    """

    name: str
    asked: float
    alone: float
    lower: float | None
    upper: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedGroup:
    """A group whose smallest option already uses much of a conflicting budget."""

    group: str
    num_options: int
    budget: str
    smallest: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A common factor for some budgets with which all budgets can be met.

    Attributes:
        budgets: names of the budgets that are multiplied; the others stay.
        factor: a factor that is sufficient.
        lower: proven lower bound; no factor below it is sufficient.
        usage: use of each resource by a choice that meets the multiplied budgets.
    """

    budgets: tuple[str, ...]
    factor: float
    lower: float
    usage: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasibility:
    """Result of `explain_infeasibility`; ``str`` formats it as a short text.

    Attributes:
        feasible: whether a choice meets all budgets; None when the time limit came first.
        budgets: how closely each budget can be met, alone and with the others.
        clash: names of conflicting budgets, which no choice meets together.
        minimal: whether ``clash`` is proven minimal: without any one of its budgets the others can be met.
        fixed: amount of each conflicting resource that is used whatever is chosen.
        pinned: groups whose smallest options use most of the conflicting budgets, largest share first.
        relaxation: smallest common factor for the conflicting budgets, or for all budgets if that cannot suffice.
            None when no factor suffices (a budget of zero), or none was found in time.
    """

    feasible: bool | None
    budgets: tuple[BudgetReach, ...]
    clash: tuple[str, ...]
    minimal: bool
    fixed: dict[str, float]
    pinned: tuple[PinnedGroup, ...]
    relaxation: Relaxation | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a dictionary that JSON can store."""
        return asdict(self)

    def __str__(self) -> str:
        """Format the result as a few lines and a table."""
        return "\n".join(_lines(self))


def explain_infeasibility(problem: Problem, *, time_limit: float = TIME_LIMIT_S) -> Infeasibility:
    """Explain why the budgets of ``problem`` cannot be met, and which larger budgets could be.

    Args:
        problem: any problem; if its budgets can be met, the result says so.
        time_limit: maximum time in seconds; the result then holds what is known by that time.

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
    """Whether a budget can be met with the others, given its smallest use under them; None when unknown."""
    limit = limit_of(problem.budgets[name])
    if least.impossible or least.lower > limit:
        return False
    return True if least.upper is not None and least.upper <= limit else None


def _clash(problem: Problem, programs: UsePrograms) -> tuple[tuple[str, ...], bool]:
    """Return budgets that cannot be met together, and whether they are proven minimal (a deletion filter)."""
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
            together = "the others cannot be met"
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
        so_far = "" if _same(least.lower, least.factor) else f" (proven: at least {least.lower:.6g} is needed)"
        yield f"Multiplying {', '.join(least.budgets)} by {least.factor:.6g} is enough{so_far}: a choice uses {uses}."
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
