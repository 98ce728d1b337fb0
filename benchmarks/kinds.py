"""Solvers on many kinds of problem at one time limit: is `auto` as good as the best of them, and where not?

    python -m benchmarks.kinds [--time-limit S] [--seeds N] [--solvers auto,anneal,…] [--only KIND] [--data FOLDER]
        [--processor-time] [--library]

Generated problems depend on the seed only; with ``--data`` the published instances in ``FOLDER/instances`` are added
(max-cut, QUBO, quadratic and multiple-choice knapsacks). The distance of a run is the difference of its objective from
the best that any solver found on the same problem, in percent. With ``--library`` the problems are the instances of
`benchmarks.library`, and the best includes the best known objectives. Every run is written when it ends; an interrupted
run with the same settings resumes. With ``--processor-time`` limits are in processor time, for machines that others use
as well, except for SCIP and HiGHS, which count wall time.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clock import processor_time
from benchmarks.tables import Rows, markdown, write_results
from formulations import Problem
from formulations.generators.families import member
from formulations.generators.random_instances import layered_problem
from solvers import SolverError, solve
from solvers.library import READERS, Library

SOLVERS = ("auto", "anneal", "ga", "lagrangian", "miqp", "milp", "bifurcation")

LIBRARY = Path(__file__).parent / "instances"

TIED = 1e-3
"""Relative distance from the best that counts as tied."""

PREFIXES = {"maxcut": "max-cut", "qubo": "qubo", "qkp": "qkp", "mmkp": "mmkp"}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear 1,000 × 6": ("layers", {"num_groups": 1000, "rank": 0}),
    "linear 200 × 10, 4 budgets": ("multiple_choice_knapsack", {"groups": 200, "options": 10, "budgets": 4}),
    "linear 200 × 10, 10 budgets": ("multiple_choice_knapsack", {"groups": 200, "options": 10, "budgets": 10}),
    "linear 5,000 × 10, 4 budgets": ("multiple_choice_knapsack", {"groups": 5000, "options": 10, "budgets": 4}),
    "rank 8, 50 × 6": ("layers", {"num_groups": 50}),
    "rank 8, 200 × 6": ("layers", {"num_groups": 200}),
    "rank 8, 1,000 × 6": ("layers", {"num_groups": 1000}),
    "rank 8, 10,000 × 6": ("layers", {"num_groups": 10_000}),
    "rank 64, 100 × 6": ("layers", {"num_groups": 100, "rank": 64}),
    "rank 8, 200 × 6, tight": ("layers", {"num_groups": 200, "budget": 0.05}),
    "rank 8, 200 × 6, no budget": ("layers", {"num_groups": 200, "limited": False}),
    "rank 8, 100 × 6, 4 budgets": ("layers", {"num_groups": 100, "more_budgets": 3}),
    "rank 16, 2,000 × 2": ("layers", {"num_groups": 2000, "bits": [2, 8], "rank": 16}),
    "rank 8, 50 × 100": ("layers", {"num_groups": 50, "bits": [2 + 6 * i / 99 for i in range(100)]}),
    "sparse 200 × 6": ("layers", {"num_groups": 200, "degree": 6}),
    "sparse 1,000 × 6": ("layers", {"num_groups": 1000, "degree": 6}),
    "sparse 10,000 × 6": ("layers", {"num_groups": 10_000, "degree": 6}),
    "sparse signed 200 × 20": ("signed_pairs", {"groups": 200, "options": 20, "degree": 4}),
    "sparse signed 500 × 4": ("signed_pairs", {"groups": 500, "options": 4, "degree": 6}),
    "whole numbers with ties 200 × 5": ("signed_pairs", {"groups": 200, "options": 5, "degree": 4, "largest": 2}),
    "whole numbers to 1,000, 200 × 4": ("signed_pairs", {"groups": 200, "options": 4, "degree": 6, "largest": 1000}),
    "dense signed 60 × 4": ("dense_pairs", {"groups": 60, "options": 4}),
    "sparse and factor 200 × 6": ("factor_and_pairs", {"num_groups": 200}),
    "chain 300 × 8": ("chain", {"groups": 300, "options": 8}),
    "max-cut 200, density .1": ("random_max_cut", {"vertices": 200, "density": 0.1}),
    "max-cut 800, torus": ("torus_max_cut", {"rows": 20, "columns": 40}),
    "max-cut 2,000, density .01": ("random_max_cut", {"vertices": 2000, "density": 0.01}),
    "QUBO 100, dense": ("random_qubo", {"variables": 100, "density": 1.0}),
    "QKP 300, 50 %": ("quadratic_knapsack", {"items": 300, "density": 0.5}),
}
"""Family and arguments of each kind; the seed is added."""


def published(folder: Path) -> Iterator[tuple[str, Problem]]:
    """Return the instances in a folder; the beginning of a file's name is its kind."""
    for file in sorted(folder.glob("*.txt")):
        reader = PREFIXES.get(file.name.split("_")[0])
        if reader is not None:
            yield file.stem, READERS[reader](file)


def instances(only: str, data: Path | None) -> Iterator[tuple[str, int, Problem]]:
    """Name, seed (0) and problem of each instance of the library whose problem is at hand."""
    library = Library(LIBRARY, None if data is None else data / "instances")
    library.require_whole()
    for record in library:
        if only in record.name and library.has(record.name):
            yield record.name, 0, library.problem(record.name)


def best_known() -> dict[tuple[str, int], float]:
    """The best known objective of each instance of the library, by name and seed (0)."""
    known, library = {}, Library(LIBRARY)
    library.require_whole()
    for record in library:
        objectives = [objective for objective in (record.best, record.literature) if objective is not None]
        if objectives:
            known[record.name, 0] = min(objectives)
    return known


def problems(seeds: int, only: str, data: Path | None) -> Iterator[tuple[str, int, Problem]]:
    """Kind, seed and problem."""
    for kind, (family, arguments) in KINDS.items():
        if only in kind:
            yield from ((kind, seed, member(family, {**arguments, "seed": seed})) for seed in range(seeds))
    if data is not None:
        yield from ((name, 0, problem) for name, problem in published(data / "instances") if only in name)


def run(problem: Problem, solver: str, time_limit: float) -> dict[str, Any]:
    """One run of one solver."""
    try:
        solution = solve(problem, solver, seed=0, time_limit=time_limit)
    except SolverError as error:
        return {"status": type(error).__name__, "objective": None, "bound": None, "wall_s": None}
    return {
        "status": str(solution.status),
        "objective": solution.objective,
        "bound": solution.bound,
        "wall_s": solution.wall_s,
    }


def table(
    rows: list[dict[str, Any]], solvers: tuple[str, ...], known: Mapping[tuple[str, int], float]
) -> tuple[str, list[dict[str, Any]]]:
    """The table of each solver's distance from the best in percent and `auto`'s proven gap, by problem."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    best = dict(known)
    for row in rows:
        key = (row["kind"], row["seed"])
        if row["objective"] is not None:
            best[key] = min(best.get(key, np.inf), row["objective"])
    for row in rows:
        key = (row["kind"], row["seed"])
        line = lines.setdefault(key, {"kind": row["kind"], "seed": row["seed"], "best": best.get(key)})
        if row["objective"] is not None:
            line[row["solver"]] = 100 * (row["objective"] - best[key]) / (abs(best[key]) or 1.0)
        if row["solver"] == "auto":
            line |= {"status": row["status"], "wall_s": row["wall_s"], "bound": row["bound"]}
    columns = {"kind": "kind", "seed": "seed", "best": "best found"} | {name: f"{name} %" for name in solvers}
    columns |= {"status": "auto says", "wall_s": "auto's time (s)"}
    listed = list(lines.values())
    text = markdown(listed, columns)
    if known or len({row["solver"] for row in rows}) > 1:
        tied = sum(line.get("auto", np.inf) <= 100 * TIED for line in listed)
        text += f"\n\n`auto` is best or within {100 * TIED:g} % on {tied} of {len(listed)}.\n"
    return text, listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds a run")
    parser.add_argument("--seeds", type=int, default=1, help="problems of each made kind")
    parser.add_argument("--solvers", default=",".join(SOLVERS), help="names with commas")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    parser.add_argument("--data", type=Path, help="folder of the models and data; its instances are added")
    parser.add_argument("--library", action="store_true", help="solve the instances of the library instead")
    parser.add_argument("--processor-time", action="store_true", help="count processor time instead of the clock's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and table")
    arguments = parser.parse_args()
    solvers = tuple(arguments.solvers.split(","))
    if arguments.library:
        name, listed, known = "library", instances(arguments.only, arguments.data), best_known()
    else:
        name, listed, known = "kinds", problems(arguments.seeds, arguments.only, arguments.data), {}
    rows = Rows(
        arguments.out / f"{name}_rows.json",
        {"time_limit": arguments.time_limit, "processor_time": arguments.processor_time},
    )
    warm: Problem | None = layered_problem(6, degree=2)
    for kind, seed, problem in listed:
        for solver in solvers:
            if not rows.of(kind=kind, seed=seed, solver=solver):
                if warm is not None:
                    for compiled in SOLVERS:  # compile before anything is timed
                        solve(warm, compiled, seed=0, time_limit=1.0)
                    warm = None
                with processor_time(1) if arguments.processor_time else contextlib.nullcontext():
                    row = run(problem, solver, arguments.time_limit)
                rows.add({"kind": kind, "seed": seed, "solver": solver} | row)
    text, lines = table(rows.values["rows"], solvers, known)
    print(text)
    write_results(arguments.out, name, {**rows.values, "rows": lines}, text)


if __name__ == "__main__":
    main()
