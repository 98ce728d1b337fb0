"""How long each heuristic takes to come how close to the best, over 20 seeds: ``python -m benchmarks.time_to_target``.

Problems in factor form (`formulations.generators.random_instances.layered_problem`, rank 8, six options a group). The
time is that after which the target is reached with 99 %, restarts with other seeds included, with its 95 % interval
(see `solvers.compare.time_to_target`); the target is within a share of the best objective that any run found. The
second table is the performance profile for 0.1 %: the share of all runs that are there within a multiple of the
quickest solver's time. Every run is kept in a journal in ``--out``; a cut benchmark goes on from it, and only
``--fresh`` measures anew.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown, write_results
from formulations.generators.random_instances import layered_problem
from solvers import solve
from solvers.compare.runs import Comparison, Suite, compare, performance_profile, time_to_target
from solvers.compare.time_to_target import target_near

SOLVERS = ("lagrangian", "anneal", "ga", "sa")
SHARES = (0.01, 0.001, 0.0)
RATIOS = (1.0, 2.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=1.0, help="seconds for every run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--fresh", action="store_true", help="forget the runs of an earlier benchmark")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    journal = arguments.out / "time_to_target.jsonl"
    if arguments.fresh:
        journal.unlink(missing_ok=True)
    for name in SOLVERS:  # what a first run compiles is not what is measured
        solve(layered_problem(10), name, time_limit=1.0, seed=0)
    problems = {f"{groups} groups": layered_problem(groups) for groups in arguments.groups}
    suite = compare(problems, SOLVERS, time_limit=arguments.time_limit, seeds=range(arguments.seeds), journal=journal)
    rows = [row for name, comparison in suite.comparisons.items() for row in reached(name, comparison)]
    table = markdown(
        rows, {"problem": "problem", "solver": "solver", **{f"{share:.1%}": heading(share) for share in SHARES}}
    )
    within = profile(suite)
    table += "\n\n" + markdown(within, {"solver": "solver", **{f"{ratio:g}": f"≤ {ratio:g} ×" for ratio in RATIOS}})
    print(table)
    write_results(arguments.out, "time_to_target", {"reached": rows, "profile": within}, table)


def heading(share: float) -> str:
    return f"to {share:.1%}" if share else "to the best"


def reached(name: str, comparison: Comparison) -> list[dict[str, Any]]:
    """One row a solver: how many of its runs reached each target, and how soon."""
    assert comparison.best is not None
    rows = []
    for label, runs in comparison.solutions.items():
        row: dict[str, Any] = {"problem": name, "solver": label}
        for share in SHARES:
            hits = time_to_target(runs, target_near(comparison.best, share))
            row[f"{share:.1%}"] = f"{hits.hits} of {hits.runs}"
            if hits.seconds is not None:
                row[f"{share:.1%}"] += f": {hits.seconds:.2g} s ({hits.low_s:.2g}–{hits.high_s:.2g})"
        rows.append(row)
    return rows


def profile(suite: Suite) -> list[dict[str, Any]]:
    """One row a solver: its share of runs within multiples of the quickest one's time to 0.1 %."""
    rows = []
    for curve in performance_profile(suite, within=0.001):
        row: dict[str, Any] = {"solver": curve.label}
        for ratio in RATIOS:
            row[f"{ratio:g}"] = f"{curve.share[curve.ratio <= ratio][-1]:.0%}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
