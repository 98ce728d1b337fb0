"""A million channels, each kept or pruned, with pair terms of rank 64: formulated, solved and bounded, by phase.

The instance is ``formulations.generators.random_instances.channel_problem``: a group a channel, two options a group,
one budget in bytes. Compiled code is loaded before the clock starts. Time by phase (wall and processor), the peak of
the whole process's memory, objective, bound and gap.

    python -m benchmarks.million [--channels N] [--rank R] [--solver NAME] [--time-limit S] [--processor-time]
        [--out FOLDER]

With ``--processor-time`` the limit counts seconds of processor time, for machines that others use as well.
"""

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.clock import processor_time
from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations.generators.random_instances import channel_problem
from solvers import solve

COLUMNS = {"phase": "phase", "wall_s": "time [s]", "cpu_s": "processor [s]", "peak_gb": "peak memory [GB]"}


def main() -> None:
    arguments = _arguments()
    solver, limit = arguments.solver, arguments.time_limit
    solve(channel_problem(50, rank=3), solver, seed=0, bound=True, time_limit=5.0)  # loads compiled code
    rows: list[dict[str, Any]] = []
    problem = timed(rows, "formulate", lambda: channel_problem(arguments.channels, rank=arguments.rank))
    with processor_time(1) if arguments.processor_time else contextlib.nullcontext():
        solution = timed(rows, "solve", lambda: solve(problem, solver, seed=0, bound=True, time_limit=limit))
    judged = timed(rows, "evaluate", lambda: problem.evaluate(found(solution).choice))
    assert judged.feasible
    total = {key: sum(row[key] for row in rows) for key in ("wall_s", "cpu_s")}
    rows.append({"phase": "all", **total, "peak_gb": peak_gb()})
    answer = {
        "problem": repr(problem),
        "solver": solution.solver,
        "status": str(solution.status),
        "objective": judged.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "timing": solution.timing,
        "plan": solution.details.get("plan"),
    }
    table = markdown(rows, COLUMNS)
    print(table, *(f"{name}: {value}" for name, value in answer.items()), sep="\n")
    write_results(arguments.out, "million", {"phases": rows, **answer}, table)


def timed(rows: list[dict[str, Any]], phase: str, work: Callable[[], Any]) -> Any:
    """Run ``work`` and return its result; its time and the peak memory so far become a row."""
    start, begun = time.monotonic(), time.process_time()
    result = work()
    wall_s, cpu_s = time.monotonic() - start, time.process_time() - begun
    rows.append({"phase": phase, "wall_s": wall_s, "cpu_s": cpu_s, "peak_gb": peak_gb()})
    return result


def peak_gb() -> float:
    """The most memory this process has held, in gigabytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=1_000_000)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--time-limit", type=float, default=75.0, help="seconds for bound and solver")
    parser.add_argument(
        "--processor-time", action="store_true", help="the limit counts processor time, not the clock's"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
