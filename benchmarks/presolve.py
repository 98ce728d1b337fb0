"""Presolve: how much it takes out of a problem, how long that takes, and a solver's run without and with it.

The instances are ``formulations.generators.random_instances.layered_problem`` (G layers × 6 bit-widths, one budget in
bytes), the same with every bit-width at three shares of pruned weights whose extra cost is drawn at random (18
options, of which some are no good), clusters of layers with sparse pair terms only among themselves and a budget each,
and channels that are kept or pruned (linear, without the factor). Times are processor seconds, the least of three runs.

    python -m benchmarks.presolve [--out FOLDER]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from benchmarks.tables import markdown, write_results
from formulations import PairTerms, Problem
from formulations.generators.random_instances import channel_problem, layered_problem
from formulations.reductions.presolve import reduce_problem
from solvers import solve

RUNS = 3
COLUMNS = {
    "problem": "problem",
    "options": "options",
    "left": "left",
    "parts": "parts",
    "presolve_s": "presolve [s]",
    "solver": "solver",
    "without_s": "without [s]",
    "with_s": "with [s]",
    "status": "status without → with",
}


def pruned(groups: int, rank: int) -> Problem:
    """Every bit-width at three shares of pruned weights."""
    base, rng = layered_problem(groups, rank=rank), np.random.default_rng(0)
    share = np.tile([0.0, 0.5, 0.75], base.num_options)
    cost = np.repeat(base.cost, 3) * (1.0 + share * rng.lognormal(0.0, 1.5, len(share)))
    size = np.ceil(np.repeat(base.resources["bytes"], 3) * (1.0 - 0.8 * share))  # the rest goes into the indices
    factor = None if base.pairs.factor is None else np.repeat(base.pairs.factor, 3, axis=0)
    options = [[f"{bits}, {part} pruned" for bits in base.options[0] for part in ("none", "half", "most")]] * groups
    return Problem(base.groups, options, cost, {"bytes": size}, base.budgets, PairTerms(factor=factor))


def clusters(count: int, groups: int) -> Problem:
    """Problems with sparse pair terms that have nothing to do with each other."""
    each = [layered_problem(groups, degree=4, seed=seed) for seed in range(count)]
    size = each[0].num_options
    uses = {f"bytes{i}": np.zeros(count * size) for i in range(count)}
    for i, cluster in enumerate(each):
        uses[f"bytes{i}"][i * size : (i + 1) * size] = cluster.resources["bytes"]
    return Problem(
        [f"{name} of {i}" for i, cluster in enumerate(each) for name in cluster.groups],
        [options for cluster in each for options in cluster.options],
        np.concatenate([cluster.cost for cluster in each]),
        uses,
        {f"bytes{i}": cluster.budgets["bytes"] for i, cluster in enumerate(each)},
        PairTerms(sparse=scipy.sparse.csr_array(scipy.sparse.block_diag([cluster.pairs.sparse for cluster in each]))),
    )


def channels(count: int) -> Problem:
    """Channels to keep or prune, without pair terms."""
    problem = channel_problem(count, rank=1)
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    return Problem(problem.groups, problem.options, problem.cost, resources, budgets)


CASES: tuple[tuple[str, Callable[[], Problem], str | None], ...] = (
    ("10,000 layers, linear", lambda: layered_problem(10_000, rank=0), "lagrangian"),
    ("10,000 layers, linear, 18 options", lambda: pruned(10_000, 0), "lagrangian"),
    ("300 layers, linear, 18 options", lambda: pruned(300, 0), "milp"),
    ("200 layers, rank 8", lambda: layered_problem(200), None),
    ("1,000 layers, rank 8", lambda: layered_problem(1_000), None),
    ("40 layers, rank 8, 18 options", lambda: pruned(40, 8), "auto"),
    ("6 clusters of 8 layers, sparse", lambda: clusters(6, 8), "milp"),
    ("1,000,000 channels, linear", lambda: channels(1_000_000), None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    out = parser.parse_args().out
    rows = []
    for name, make, solver in CASES:
        problem = make()
        rows.append({"problem": name, "solver": solver, **_row(problem, solver)})
        print(markdown(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    table = markdown(rows, COLUMNS)
    print("\n" + table)
    write_results(out, "presolve", rows, table)


def _row(problem: Problem, solver: str | None) -> dict[str, Any]:
    summary = reduce_problem(problem).summary()
    row: dict[str, Any] = {
        "options": problem.num_options,
        "left": summary["options"][1],
        "parts": summary["parts"],
        "presolve_s": min(_seconds(lambda: reduce_problem(problem)) for _ in range(RUNS)),
    }
    if solver is not None:
        solve(layered_problem(5), solver if solver != "milp" else "auto", time_limit=1.0)  # loads compiled code
        solutions = {}
        for presolve in (False, True):
            key = "with_s" if presolve else "without_s"
            start = time.process_time()
            solutions[presolve] = solve(problem, solver, seed=0, time_limit=20.0, presolve=presolve)
            row[key] = time.process_time() - start
        row["status"] = f"{solutions[False].status} → {solutions[True].status}"
        row["objectives"] = [solutions[False].objective, solutions[True].objective]
    return row


def _seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    main()
