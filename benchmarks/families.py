"""Families of options: each alone, and the joint choice of rank, sparsity and bits that contains them all.

One measurement serves all families: each is the same problem with the other options left out (`subproblem`). Every
family starts from the best choice of those it contains, the joint one from the best of all: it is never worse in
predicted loss, which `solve_families` asserts and prints.

What always holds: a family has all the options that it would have if it had been measured alone (`Apart`).
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.found import found
from benchmarks.tables import Rows
from formulations import Problem
from qcompress import Measurement, Options, Refined
from qcompress.options import Fitted
from qcompress.transforms.base import Keep, Transform, Weight
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from solvers import Solution, judge, solve

Choice = NDArray[np.int64]
Family = Callable[[Transform], bool]

JOINT = "joint"
FAMILIES: dict[str, Family] = {  # the transforms that each has besides keeping; one that contains another comes later
    "bits": lambda transform: isinstance(transform, PruneQuantize) and not transform.sparsity,
    "sparsity and bits": lambda transform: isinstance(transform, PruneQuantize),
    "rank": lambda transform: isinstance(transform, LowRank) and transform.then == Keep(),
    "rank then bits": lambda transform: isinstance(transform, LowRank) and not getattr(transform.then, "sparsity", 0),
    JOINT: lambda _: True,
}


@dataclass(frozen=True)
class Apart(Options):
    """Options thinned separately for each family.

    Options that are dominated are dropped for every weight. Dropped across families, an option of one family could
    remove those of another: 4 bits of half of the weights take the bytes of 3 bits of all, and with the smaller error
    they would leave the family of plain bit-widths without 3 bits.
    """

    def for_weight(self, weight: Weight) -> tuple[Fitted, ...]:
        """Keep, then what any of the families has for ``weight``."""
        fitted: dict[Transform, Fitted] = {}
        for family in FAMILIES.values():
            offers = [offer for offer in self.offers if (it := offer.resolve(weight)) is not None and family(it)]
            fitted |= {fit.transform: fit for fit in Options(tuple(offers)).for_weight(weight)}
        return tuple(fitted.values())


def measured(folder: Path, name: str, options: Options, run: Callable[[Options], Measurement]) -> Measurement:
    """The measurement by ``run`` of the options, thinned by family; read from a file in ``folder`` if it exists."""
    key = hashlib.sha256(json.dumps(options.to_json()).encode()).hexdigest()[:8]
    file = folder / f"{name}_{key}.npz"
    if file.exists():
        measurement = Measurement.load(file)
        print(f"{file}: {len(measurement.cost)} options, measured before", flush=True)
        return measurement
    begun = time.perf_counter()
    measurement = run(Apart(options.offers))
    print(f"measured {len(measurement.cost)} options in {time.perf_counter() - begun:.0f} s", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    measurement.save(file)
    return measurement


def kept(problem: Problem, measurement: Measurement, family: Family, only: str = "") -> list[list[int]]:
    """Indices of the options of each group that belong to a family; only for layers whose names start with ``only``."""
    rows = zip(measurement.parts, measurement.transforms, strict=True)
    keep = [
        [i for i, transform in enumerate(options) if i == 0 or (part.name.startswith(only) and family(transform))]
        for part, options in rows
    ]
    return keep + [[0]] * (problem.num_groups - len(keep))  # the last group is what is fixed


def subproblem(problem: Problem, keep: list[list[int]]) -> Problem:
    """The problem with only the options ``keep`` of each group."""
    flat = np.concatenate(
        [start + np.array(numbers) for start, numbers in zip(problem.group_offsets, keep, strict=False)]
    )
    pairs = problem.pairs
    if pairs is not None:
        assert pairs.factor is not None
        pairs = type(pairs)(factor=pairs.factor[flat])
    options = [[problem.options[g][i] for i in numbers] for g, numbers in enumerate(keep)]
    resources = {name: use[flat] for name, use in problem.resources.items()}
    fixed = problem.fixed
    return Problem(
        problem.groups, options, problem.cost[flat], resources, problem.budgets, pairs, problem.offset, fixed
    )


def restricted(measurement: Measurement, keep: list[list[int]]) -> Measurement:
    """The measurement with only the options ``keep`` of each part."""
    sizes = [len(numbers) for numbers in measurement.transforms]
    starts = np.cumsum([0, *sizes[:-1]])
    flat = np.concatenate([start + np.array(numbers) for start, numbers in zip(starts, keep, strict=False)])
    rows = zip(measurement.transforms, keep, strict=False)
    return replace(
        measurement,
        transforms=tuple(tuple(options[i] for i in numbers) for options, numbers in rows),
        cost=measurement.cost[flat],
        error=measurement.error[flat],
        factor=measurement.factor[flat],
        resources=MappingProxyType({name: use[flat] for name, use in measurement.resources.items()}),
    )


def solved(problem: Problem, keep: list[list[int]], time_limit: float, starts: list[Choice]) -> Solution | None:
    """The best solution with the options ``keep``, as a choice of the whole problem; None if it is infeasible.

    Bound and gap hold for the restricted problem.

    Args:
        problem: the problem with all options.
        keep: indices of the allowed options of each group.
        time_limit: seconds.
        starts: choices of the whole problem; the best of those that use only allowed options is the initial choice.
    """
    small = subproblem(problem, keep)
    least = small.minimum_usage()
    if any(least[name] > budget for name, budget in problem.budgets.items()):
        return None
    inside = [start for start in starts if all(int(i) in numbers for numbers, i in zip(keep, start, strict=True))]
    best = min(inside, key=lambda choice: problem.evaluate(choice).objective, default=None)
    initial = None if best is None else [numbers.index(int(i)) for numbers, i in zip(keep, best, strict=True)]
    small_solution = solve(small, time_limit=time_limit, seed=0, initial=initial)
    chosen = found(small_solution).choice
    solution = judge(problem, np.array([numbers[i] for numbers, i in zip(keep, chosen, strict=True)]))
    assert solution.feasible
    return replace(solution, bound=small_solution.bound, gap=small_solution.gap)


def solve_families(
    rows: Rows,
    setting: Mapping[str, Any],
    problem: Problem,
    measurement: Measurement,
    worth: Callable[[Solution], Mapping[str, Any]],
    *,
    families: Mapping[str, Family] = FAMILIES,
    time_limit: float,
    only: str = "",
) -> dict[str, Solution]:
    """Add a row for the best choice of each family, solving where there is none yet; return the solutions.

    Args:
        rows: receives the rows; a row without bytes says that the family cannot meet the budgets.
        setting: entries common to all rows of this problem.
        problem: the problem, made from ``measurement``.
        measurement: the measurement of all options.
        worth: gives the entries of a row besides bytes, predicted loss and proven gap.
        families: names of the families, in the order of `FAMILIES`.
        time_limit: seconds for each solve.
        only: common beginning of the names of the layers to choose about; all others are kept unchanged.
    """
    solutions: dict[str, Solution] = {}
    for name, family in families.items():
        if before := rows.of(**setting, choice=name):
            solution = judge(problem, choice_of(problem, before[0]["options"])) if "options" in before[0] else None
        else:
            starts = [found(solution).choice for solution in solutions.values()]
            solution = solved(problem, kept(problem, measurement, family, only), time_limit, starts)
            rows.add({**setting, "choice": name} | ({} if solution is None else row_of(measurement, solution, worth)))
        if solution is None:
            continue
        if name == JOINT and solutions:
            best, joint = best_of(solutions), found(solution).objective
            single = found(solutions[best]).objective
            print(f"predicted loss: joint {joint:.4g}, best family ({best}) {single:.4g}")
            assert joint <= single * (1 + 1e-9), "the joint choice is worse than a family"
        solutions[name] = solution
    return solutions


def best_of(solutions: Mapping[str, Solution]) -> str:
    """The name of the solution with the least predicted loss."""
    return min(solutions, key=lambda name: found(solutions[name]).objective)


def row_of(
    measurement: Measurement, solution: Solution, worth: Callable[[Solution], Mapping[str, Any]]
) -> dict[str, Any]:
    """The row of a choice; `choice_of` restores the choice from its ``options``."""
    return {
        "bytes": solution.usage["bytes"],
        "predicted": solution.objective,
        "gap": solution.gap,
        **worth(solution),
        "options": labels_of(measurement, found(solution).choice),
    }


def refine_families(
    rows: Rows,
    setting: Mapping[str, Any],
    problem: Problem,
    measurement: Measurement,
    worth: Callable[[Solution], Mapping[str, Any]],
    solutions: Mapping[str, Solution],
    refine: Callable[[Measurement, Problem, Choice], Refined],
) -> None:
    """Add rows for the joint choice and the best family's choice after refinement.

    Args:
        rows: receives the rows.
        setting: entries common to all rows of this problem.
        problem: the problem, made from ``measurement``.
        measurement: the measurement of all options.
        worth: gives the entries of a row besides bytes, predicted loss and proven gap.
        solutions: the solutions that `solve_families` returned.
        refine: `qcompress.refine` with the model and its data.
    """
    apart = {name: solution for name, solution in solutions.items() if name != JOINT}
    for name in dict.fromkeys((best_of(apart) if apart else JOINT, JOINT)):
        if name not in solutions or rows.of(**setting, choice=f"{name}, refined"):
            continue
        keep, start = kept(problem, measurement, FAMILIES[name]), found(solutions[name]).choice
        inside = np.array([numbers.index(int(i)) for numbers, i in zip(keep, start, strict=True)])
        begun = time.process_time()
        refined = refine(restricted(measurement, keep), subproblem(problem, keep), inside)
        seconds = time.process_time() - begun
        solution = judge(problem, np.array([numbers[i] for numbers, i in zip(keep, refined.choice, strict=True)]))
        predicted = refined.steps[-1].predicted if refined.steps else solutions[name].objective
        refinement = {"rounds": len(refined.steps), "cpu_s": seconds, "predicted": predicted, "gap": None}
        rows.add({**setting, "choice": f"{name}, refined", **row_of(measurement, solution, worth), **refinement})


def labels_of(measurement: Measurement, choice: Choice) -> list[str]:
    """The chosen option of every layer."""
    return [labels[int(option)] for labels, option in zip(measurement.labels, choice, strict=False)]


def choice_of(problem: Problem, labels: list[str]) -> Choice:
    """Undo `labels_of`."""
    chosen = [options.index(label) for options, label in zip(problem.options, labels, strict=False)]
    return np.array(chosen + [0] * (problem.num_groups - len(chosen)))
