"""How good the heuristic solvers are in a few seconds, on factor-form problems.

    python -m benchmarks.solvers_quick --output benchmarks/results/solvers_quick

Two tables: 200 groups of 6 options (rank 8), every solver at the same time limit against the best known choice (the
best of a long run with many starts, and of all runs here); and 50 groups, where the QUBO route shows what its
samples are worth raw, repaired and polished. The dual bound, where it is above zero, says how far off at most the
best known is. Writes the same as ``.json`` and ``.md``.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.found import found
from benchmarks.tables import write_results
from formulations.generators.random_instances import layered_problem
from solvers import Solution, solve
from solvers.bounds.duality import dual_bound
from solvers.kernels.cooling import NO_BEST, Schedule, cool
from solvers.kernels.moves import to_arrays


def main() -> None:
    arguments = _arguments()
    report = {
        "moves_per_s": moves_per_s(),
        "quick": [
            row for seed in range(arguments.problems) for row in quick(seed, arguments.time_limit, arguments.seeds)
        ],
        "qubo": [row for seed in range(arguments.problems) for row in qubo(seed)],
    }
    text = markdown(report, arguments.time_limit)
    print(text)
    write_results(arguments.output.parent, arguments.output.stem, report, text)


def quick(problem_seed: int, time_limit: float, seeds: int) -> list[dict[str, Any]]:
    """200 groups: solvers at the same time limit, several seeds each."""
    problem = layered_problem(200, seed=problem_seed)
    runs = {
        name: [solve(problem, name, time_limit=time_limit, seed=seed) for seed in range(seeds)]
        for name in ("anneal", "ga", "greedy", "lagrangian")
    }
    long = solve(problem, "anneal", seed=10_000, sweeps=20_000, population=16)
    best = min(run.objective for some in [*runs.values(), [long]] for run in some if run.objective is not None)
    bound = dual_bound(problem).value
    return [
        {"problem": problem_seed, "solver": name, "bound_gap": (best - bound) / best, **_summary(some, best)}
        for name, some in runs.items()
    ]


def qubo(problem_seed: int) -> list[dict[str, Any]]:
    """50 groups: the QUBO route, step by step, for each encoding."""
    problem = layered_problem(50, seed=problem_seed)
    rows = []
    best = found(solve(problem, "anneal", seed=10_000, sweeps=20_000)).objective
    for encoding in ("one-hot", "domain-wall"):
        solution = solve(problem, "sa", seed=0, encoding=encoding)
        steps = {name: solution.details[f"objective_{name}"] for name in ("raw", "decoded", "repaired", "polished")}
        rows.append(
            {"problem": problem_seed, "encoding": encoding, "wall_s": solution.wall_s}
            | {name: None if value is None else value / best - 1 for name, value in steps.items()}
            | {name: solution.details[name] for name in ("share_valid", "share_feasible_decoded")}
        )
    return rows


def moves_per_s() -> dict[str, float]:
    """Speed of the annealing kernel, one thread, at 200 groups."""
    speeds = {}
    for name, problem in {
        "rank 8": layered_problem(200),
        "degree 6": layered_problem(200, degree=6),
        "linear": layered_problem(200, rank=0),
    }.items():
        a, chosen = to_arrays(problem), problem.group_offsets[:-1].copy()
        state, price, steps = np.ones(1, dtype=np.uint64), np.ones(1), 1_000_000
        for count in (1, steps):  # the first call compiles
            start = time.perf_counter()
            schedule = Schedule(1e-3, 1.0, count, 0.01)
            cool(a, np.arange(200), chosen, price, state, schedule, chosen.copy(), NO_BEST)
        speeds[name] = steps / (time.perf_counter() - start)
    return speeds


def markdown(report: dict[str, Any], time_limit: float) -> str:
    """The report as Markdown tables."""
    lines = [f"200 groups × 6 options, rank 8, {time_limit:g} s; distance from the best known:", ""]
    lines += ["| problem | solver | median | worst | feasible | time | best known above bound by |", "|" + "---|" * 7]
    lines += [
        f"| {row['problem']} | {row['solver']} | {row['median']:.2%} | {row['worst']:.2%} | {row['feasible']:.0%} "
        f"| {row['wall_s']:.1f} s | {row['bound_gap']:.2%} |"
        for row in report["quick"]
    ]
    lines += ["", "sa on the QUBO, 50 groups × 6 options, rank 8; distance from the best known:", ""]
    lines += ["| problem | encoding | raw | decoded | repaired | polished | valid | feasible decoded | time |"]
    lines += ["|" + "---|" * 9]
    for row in report["qubo"]:
        steps = " | ".join(_percent(row[name]) for name in ("raw", "decoded", "repaired", "polished"))
        shares = f"{row['share_valid']:.0%} | {row['share_feasible_decoded']:.0%}"
        lines.append(f"| {row['problem']} | {row['encoding']} | {steps} | {shares} | {row['wall_s']:.1f} s |")
    speeds = ", ".join(f"{name} {speed / 1e6:.1f} M" for name, speed in report["moves_per_s"].items())
    return "\n".join([*lines, "", f"moves a second, one thread: {speeds}"])


def _summary(runs: list[Solution], best: float) -> dict[str, Any]:
    gaps = [run.objective / best - 1 for run in runs if run.objective is not None]
    return {
        "median": statistics.median(gaps) if gaps else None,
        "worst": max(gaps, default=None),
        "feasible": len(gaps) / len(runs),
        "wall_s": statistics.median(run.wall_s for run in runs),
    }


def _percent(number: float | None) -> str:
    return "none" if number is None else f"{number:.2%}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/solvers_quick"), help="path, no ending")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds a run")
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
