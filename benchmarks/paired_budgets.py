"""Budgets with pair terms: widths of layers in a row, whose multiply-accumulates are kept inputs times kept outputs.

Every layer has eight options, the shares of the channels that it keeps. The budget is half of the macs. The pair terms
of the objective are a sparse matrix between neighbours and, optionally, a factor of rank 4 between all layers. Reported
are the objective and bound within the time limit, with wall and CPU seconds.

    python -m benchmarks.paired_budgets [--layers 200 1000 5000] [--ranks 0 4] [--time-limit 30]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from benchmarks.tables import markdown, write_results
from formulations import PairTerms, Problem
from solvers import solve

OPTIONS = 8
COLUMNS = {
    "layers": "layers",
    "rank": "rank of the factor",
    "solver": "solver",
    "objective": "objective",
    "bound": "bound",
    "gap": "gap %",
    "wall_s": "wall s",
    "cpu_s": "CPU s",
}


def layers_in_a_row(count: int, rank: int, seed: int = 0) -> Problem:
    """A chain of ``count`` layers with a budget of half of their macs."""
    rng, size = np.random.default_rng(seed), count * OPTIONS
    shares = np.linspace(1.0, 1.0 / OPTIONS, OPTIONS)
    kept = np.round(rng.choice([16, 32, 64, 128], count)[:, None] * shares)
    sensitivity, removed = rng.lognormal(0.0, 1.0, count), 1.0 - shares
    positions = rng.choice([1, 9], count) * rng.choice([64, 256, 1024], count)
    rows = np.repeat(np.arange(size - OPTIONS), OPTIONS)
    columns = (np.arange(OPTIONS) + OPTIONS * (1 + np.arange(count - 1))[:, None, None]) + np.zeros(
        (1, OPTIONS, 1), int
    )
    products = positions[:-1, None, None] * kept[:-1, :, None] * kept[1:, None, :]
    together = 0.5 * rng.normal(size=count - 1) * np.sqrt(sensitivity[:-1] * sensitivity[1:])
    costs = together[:, None, None] * np.outer(removed, removed)
    uses, sparse = (
        scipy.sparse.csr_array((values.ravel(), (rows, columns.ravel())), shape=(size, size))
        for values in (products, costs)
    )
    factor = None
    if rank:
        directions = 0.3 * rng.normal(size=(count, rank)) * np.sqrt(sensitivity / rank)[:, None]
        factor = (directions[:, None, :] * removed[None, :, None]).reshape(size, rank)
    ends = np.zeros((count, OPTIONS))
    ends[0], ends[-1] = 27 * 1024 * kept[0], 10 * kept[-1]
    tables = ([f"layer {i}" for i in range(count)], [[f"{share:.1%}" for share in shares]] * count)
    cost, pairs = (sensitivity[:, None] * removed**2).ravel(), PairTerms(sparse=sparse, factor=factor)
    problem = Problem(*tables, cost, {"macs": ends.ravel()}, {"macs": 0.0}, pairs, 0.0, {}, {"macs": uses})
    return problem.with_budgets(macs=0.5 * problem.evaluate([0] * count).usage["macs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results", help="where JSON and Markdown go")
    parser.add_argument("--layers", type=int, nargs="+", default=(200, 1000, 5000))
    parser.add_argument("--ranks", type=int, nargs="+", default=(0, 4))
    parser.add_argument("--solvers", nargs="+", default=("lagrangian",))
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for solver in arguments.solvers:
        solve(layers_in_a_row(5, 2), solver, time_limit=5, seed=0)  # compiles
        for count in arguments.layers:
            for rank in arguments.ranks:
                problem = layers_in_a_row(count, rank)
                start, cpu = time.perf_counter(), time.process_time()
                solution = solve(problem, solver, time_limit=arguments.time_limit, seed=0)
                times = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
                values = {"objective": solution.objective, "bound": solution.bound}
                gap = None if solution.gap is None else 100 * solution.gap
                rows.append({"layers": count, "rank": rank, "solver": solver, **values, "gap": gap, **times})
                print(rows[-1], flush=True)
    table = markdown(rows, COLUMNS)
    write_results(Path(arguments.out), "paired_budgets", rows, table)
    print(table)


if __name__ == "__main__":
    main()
