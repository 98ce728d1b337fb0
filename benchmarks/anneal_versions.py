"""`anneal` against its own earlier versions, at equal time and with the same seeds, run by turns.

* ``restarts``: the chain alone. 5,000 sweeps from each of eight random starts, again and again until time is over.
* ``recombined``: eight starts of 5,000 sweeps, then recombination until that stops paying.
* ``now``: few starts, cooled for as long as the time allows, then recombination.

The same moves and compiled code in all three. Problems: 200 groups of 6 options with a factor of rank 8; the same with
three budgets; 1,000 groups with sparse pair terms (six partners a group). The reference is what `auto` proves; where it
proves no optimum the best known counts and the table says how far at most it is from one. The margin is the difference
of the medians.

    python -m benchmarks.anneal_versions [--seeds N] [--time-limit S] [--only NAME] [--processor-time] [--out FOLDER]

With ``--processor-time`` a second is one of processor time per core, for machines that others use as well.
"""

import argparse
import contextlib
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import processor_time
from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations import Problem
from formulations.generators.random_instances import layered_problem
from solvers import Solver, solve
from solvers.base import Search
from solvers.heuristic.anneal import Anneal


def three_budgets(num_groups: int) -> Problem:
    """`layered_problem` with two further budgets, each at half of its range: random sizes of the layers times bits."""
    problem = layered_problem(num_groups)
    rng = np.random.default_rng(0)
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    bits = problem.resources["bytes"].reshape(num_groups, -1)
    for name in ("macs", "seconds"):
        use = bits / bits[:, -1:] * np.exp(rng.normal(size=(num_groups, 1)))
        resources[name] = use.ravel()
        budgets[name] = float(0.5 * (use.min(axis=1).sum() + use.max(axis=1).sum()))
    return Problem(problem.groups, problem.options, problem.cost, resources, budgets, problem.pairs)


@dataclass(frozen=True)
class Restarts(Solver):
    """Independent chains from random starts, until time is over."""

    name = "restarts"
    summary = "the first version of anneal"

    def run(self, problem: Problem, search: Search) -> None:
        while not search.expired():
            Anneal(sweeps=5000, population=8, generations=0).run(problem, search)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "rank 8, 200 groups": lambda: layered_problem(200),
    "three budgets, 200 groups": lambda: three_budgets(200),
    "degree 6, 1,000 groups": lambda: layered_problem(1000, degree=6),
}
VERSIONS: dict[str, Solver] = {
    "restarts": Restarts(),
    "recombined": Anneal(sweeps=5000, population=8),
    "now": Anneal(),
}
CORES = min(4, os.cpu_count() or 1)
"""Threads that `anneal` takes."""

COLUMNS = {
    "problem": "problem",
    "version": "version",
    "median": "median above the best [%]",
    "worst": "worst [%]",
    "margin": "margin of now [% points]",
    "open": "best above the bound by at most [%]",
}


def main() -> None:
    arguments = _arguments()
    best_s = 60.0
    rows = []
    for name in [arguments.only] if arguments.only else PROBLEMS:
        problem = PROBLEMS[name]()
        known = solve(problem, "auto", seed=0, time_limit=best_s)
        objectives: dict[str, list[float]] = {version: [] for version in VERSIONS}
        for seed in range(arguments.seeds):
            for version, solver in VERSIONS.items():
                with processor_time(CORES) if arguments.processor_time else contextlib.nullcontext():
                    solution = solve(problem, solver, seed=seed, time_limit=arguments.time_limit)
                objectives[version].append(problem.evaluate(found(solution).choice).objective)
        assert known.bound is not None
        rows += compared(name, objectives, found(known).objective, known.bound)
        print(markdown(rows[-len(VERSIONS) :], COLUMNS), flush=True)
    write_results(arguments.out, "anneal_versions", rows, markdown(rows, COLUMNS))


def compared(name: str, objectives: dict[str, list[float]], known: float, bound: float) -> list[dict[str, Any]]:
    """A row for each version."""
    best = min(known, *(min(values) for values in objectives.values()))
    medians = {version: 100 * (statistics.median(values) / best - 1) for version, values in objectives.items()}
    return [
        {
            "problem": name,
            "version": version,
            "median": medians[version],
            "worst": 100 * (max(values) / best - 1),
            "margin": medians[version] - medians["now"],
            "open": 100 * (best - bound) / best,
        }
        for version, values in objectives.items()
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds a run")
    parser.add_argument("--only", choices=tuple(PROBLEMS), help="one problem instead of all")
    parser.add_argument("--processor-time", action="store_true", help="count processor time instead of the clock's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
