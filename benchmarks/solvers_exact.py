"""Proofs and certified gaps by size and structure, with HiGHS and CBC on the same instances where they can run.

The instances are ``formulations.generators.random_instances.layered_problem``: G layers × 6 bit-widths, one budget in
bytes; linear, with a factor of rank 8, or with sparse pair terms (six partners a layer). The gap is to the proven
bound. The first call of each solver, which loads compiled code, is not counted.

    python -m benchmarks.solvers_exact [--out FOLDER] [--only linear|factor|sparse]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown, write_results
from formulations import Problem
from formulations.generators.random_instances import layered_problem
from solvers import solve

CASES: dict[str, tuple[tuple[int, str, float, dict[str, Any]], ...]] = {
    "linear": (
        (1_000, "lagrangian", 10.0, {}),
        (1_000, "dp", 10.0, {}),
        (1_000, "milp", 20.0, {"backend": "highs"}),
        (1_000, "milp", 20.0, {"backend": "cbc"}),
        (10_000, "lagrangian", 10.0, {}),
        (10_000, "dp", 10.0, {}),
        (10_000, "milp", 20.0, {"backend": "highs"}),
        (10_000, "milp", 20.0, {"backend": "cbc"}),
    ),
    "factor": (
        (50, "miqp", 10.0, {}),
        (50, "auto", 3.0, {}),
        (200, "miqp", 60.0, {}),
        (200, "auto", 2.0, {}),
        (1_000, "auto", 3.0, {}),
        (10_000, "auto", 5.0, {}),
    ),
    "sparse": (
        (200, "milp", 30.0, {"backend": "highs"}),
        (200, "auto", 5.0, {}),
        (1_000, "auto", 5.0, {}),
    ),
}
STRUCTURE: dict[str, Callable[[int], Problem]] = {
    "linear": partial(layered_problem, rank=0),
    "factor": partial(layered_problem, rank=8),
    "sparse": partial(layered_problem, degree=6),
}
COLUMNS = {
    "structure": "structure",
    "groups": "groups",
    "solver": "solver",
    "time_limit": "limit [s]",
    "wall_s": "time [s]",
    "objective": "objective",
    "gap_percent": "gap [%]",
    "status": "status",
}


def measure(structure: str, groups: int, solver: str, time_limit: float, options: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    problem = STRUCTURE[structure](groups)
    solution = solve(problem, solver, time_limit=time_limit, seed=0, **options)
    name = " ".join([solver, *options.values()])
    return {
        "structure": structure,
        "groups": groups,
        "solver": name,
        "time_limit": time_limit,
        "wall_s": round(solution.wall_s, 2),
        "objective": solution.objective,
        "gap_percent": None if solution.gap is None else 100 * solution.gap,
        "status": str(solution.status),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and table")
    parser.add_argument("--only", choices=tuple(CASES), help="one structure instead of all")
    arguments = parser.parse_args()
    rows = []
    for structure in [arguments.only] if arguments.only else CASES:
        for groups, solver, time_limit, options in CASES[structure]:
            measure(structure, 8, solver, 5.0, options)
            rows.append(measure(structure, groups, solver, time_limit, options))
            print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    write_results(arguments.out, "solvers_exact", rows, markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
