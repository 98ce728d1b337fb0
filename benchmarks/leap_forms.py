"""One problem in the form of each of Leap's hybrid solvers: size, shortest time charged, time to build, upload.

    python -m benchmarks.leap_forms --output benchmarks/results/leap_forms

Nothing is sent and no account is needed: least times are by the weights that the service publishes for its solvers
(D-Wave documentation; `PUBLISHED`). Each form is built in a process of its own, so that its peak of memory is its
own. Writes the same as ``.json`` and ``.md``.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown, write_results
from formulations import Problem
from formulations.generators.random_instances import layered_problem

PUBLISHED: dict[str, dict[str, Any]] = {
    "leap-cqm": {"minimum_time_limit_s": 5.0},  # the weights are those of `CqmForm`
    "leap-nl": {"min_time_limit": 5.0},
    "leap-bqm": {
        "minimum_time_limit": [
            [1, 3.0],
            [1024, 3.0],
            [4096, 10.0],
            [10_000, 40.0],
            [30_000, 200.0],
            [100_000, 600.0],
            [1_000_000, 600.0],
        ]
    },
}

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "200 groups, dense factor of rank 8": partial(layered_problem, 200),
    "1,000 groups, dense factor of rank 8": partial(layered_problem, 1000),
    "1,000 groups, sparse pairs of degree 6": partial(layered_problem, 1000, degree=6),
    "10,000 groups, sparse pairs of degree 6": partial(layered_problem, 10_000, degree=6),
}

COLUMNS = {
    "problem": "problem",
    "solver": "form",
    "size": "size",
    "min_time_s": "least time, s",
    "build_s": "model and file, CPU s",
    "upload_bytes": "upload, bytes",
    "peak_bytes": "peak memory, bytes",
}


def built(solver: str, problem_name: str) -> dict[str, Any]:
    """One form, in this process; imports are not timed."""
    import dwave.optimization  # noqa: F401

    from formulations.reductions.scaling import normal_form
    from solvers.leap.hybrid import LeapSolver
    from solvers.registry import solver_class

    problem = normal_form(PROBLEMS[problem_name]()).problem
    back_end = solver_class(solver)
    assert issubclass(back_end, LeapSolver)
    before = time.process_time()
    form = back_end.form_class().first(problem, None, back_end.option_defaults())
    with form.file() as file:
        spent = time.process_time() - before
        upload_bytes = file.seek(0, 2)
    return {
        "problem": problem_name,
        "solver": solver,
        "size": ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in form.sizes().items()),
        "min_time_s": form.min_time_s(PUBLISHED[solver]),
        "build_s": spent,
        "upload_bytes": float(upload_bytes),
        "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/leap_forms"), help="path, no ending")
    parser.add_argument("--one", nargs=2, metavar=("FORM", "PROBLEM"), help="build one and print its row as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(built(*arguments.one)))
        return
    rows = []
    for problem in PROBLEMS:
        for solver in PUBLISHED:
            command = [sys.executable, "-m", "benchmarks.leap_forms", "--one", solver, problem]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))  # noqa: S603
    table = markdown(rows, COLUMNS)
    print(table)
    write_results(arguments.output.parent, arguments.output.name, rows, table)


if __name__ == "__main__":
    main()
