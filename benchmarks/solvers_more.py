"""CP-SAT, the portfolio, the beam search on a measured loss, and the two-objective front, against other solvers.

    python -m benchmarks.solvers_more --output benchmarks/results/solvers_more

Four tables on `layered_problem`s of 6 options a group. (1) CP-SAT beside the other exact solvers at one time limit.
(2) The portfolio beside `auto`. (3) Beam search where the prediction is wrong by half and knows no pair terms: how far
the true loss is above the best known, by number of measurements, beside the prediction's own optimum. (4) The front,
held against what `lagrangian` finds at single budgets (proven where there are no pairs). CPU time stands beside wall
time, for the cores may be shared; that of the portfolio's processes is not in it. Writes the same as ``.json`` and
``.md``.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations import Problem
from formulations.generators.random_instances import layered_problem
from solvers import SolverError, beam_search, pareto_front, solve

FAMILIES: dict[str, Callable[[], Problem]] = {
    "linear, 200 groups": partial(layered_problem, 200, rank=0),
    "sparse of degree 6, 50 groups": partial(layered_problem, 50, degree=6),
    "factor of rank 8, 20 groups": partial(layered_problem, 20),
    "factor of rank 8, 50 groups": partial(layered_problem, 50),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solvers_more"), help="path, no ending")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a run of an exact solver")
    arguments = parser.parse_args()
    for solver in ("cp-sat", "milp", "miqp", "auto", "portfolio"):  # compile before anything is timed
        solve(layered_problem(6, degree=2), solver, seed=0)
    limit = arguments.time_limit
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
        "exact": (exact(("cp-sat", "milp", "miqp"), limit), SOLVED),
        "portfolio": (exact(("auto", "portfolio"), limit), SOLVED),
        "beam": (
            beam(),
            {"seed": "seed", "prediction": "prediction's optimum", **{str(m): f"{m} measured" for m in MEASUREMENTS}},
        ),
        "front": (
            front(),
            {"problem": "problem", "points": "points", "above": "worst above single budgets", "cpu_s": "CPU s"},
        ),
    }
    text = "\n\n".join(f"{name}\n\n{markdown(rows, columns)}" for name, (rows, columns) in tables.items())
    print(text)
    output: Path = arguments.output
    write_results(output.parent, output.name, {name: rows for name, (rows, _) in tables.items()}, text)


SOLVED = {
    "problem": "problem",
    "solver": "solver",
    "status": "status",
    "gap": "gap",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
}
MEASUREMENTS = (100, 300, 1000)


def exact(names: tuple[str, ...], time_limit: float) -> list[dict[str, Any]]:
    """Every solver on every family."""
    rows = []
    for family, made in FAMILIES.items():
        problem = made()
        for name in names:
            try:
                solution, cpu = timed(partial(solve, problem, name, seed=0, time_limit=time_limit))
            except SolverError as error:
                rows.append({"problem": family, "solver": name, "status": f"refused: {type(error).__name__}"})
                continue
            rows.append(
                {"problem": family, "solver": name, "status": str(solution.status), "gap": percent(solution.gap)}
                | {"wall_s": solution.wall_s, "cpu_s": cpu}
            )
    return rows


def beam() -> list[dict[str, Any]]:
    """20 groups; the true loss has pair terms, the prediction has none and wrong costs."""
    rows = []
    for seed in range(3):
        true = layered_problem(20, seed=seed)
        cost = true.cost * np.random.default_rng(seed).lognormal(0.0, 0.4, true.num_options)
        predicted = Problem(true.groups, true.options, cost, dict(true.resources), dict(true.budgets))
        best = found(solve(true, "miqp", seed=0, time_limit=30)).objective
        blind = found(solve(predicted, "lagrangian")).choice
        row: dict[str, Any] = {"seed": seed, "prediction": percent(true.evaluate(blind).objective / best - 1)}
        for most in MEASUREMENTS:
            search = beam_search(predicted, lambda choice, p=true: p.evaluate(choice).objective, max_measurements=most)
            row[str(most)] = f"{percent(search.loss / best - 1)} ({search.measurements})"
        rows.append(row)
    return rows


def front() -> list[dict[str, Any]]:
    """Compare the front at five budgets with a solver that solves for each."""
    rows = []
    for family in ("linear, 200 groups", "factor of rank 8, 50 groups"):
        problem = FAMILIES[family]()
        low = problem.minimum_usage()["bytes"]
        starts = problem.group_offsets[:-1]
        high = float(np.maximum.reduceat(problem.resources["bytes"], starts).sum())
        free = problem.with_budgets(bytes=high)
        points, cpu = timed(partial(pareto_front, free, "bytes", seed=0))
        above = []
        for share in (0.05, 0.1, 0.2, 0.4, 0.7):
            budget = low + share * (high - low)
            alone = found(solve(problem.with_budgets(bytes=budget), "lagrangian", seed=0)).objective
            point = points.best_within(budget)
            assert point is not None
            above.append(point.objective / alone - 1)
        rows.append({"problem": family, "points": len(points), "above": percent(max(above)), "cpu_s": cpu})
    return rows


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``run``, and the CPU seconds of this process."""
    begun = time.process_time()
    result = run()
    return result, time.process_time() - begun


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    main()
