"""The QUBO route: every sampler with every encoding, step by step, against proven optima.

    python -m benchmarks.qubo [--problems 5] [--groups 50] [--samplers sa,tabu] [--time-limit SECONDS] [--out FOLDER]

Dense problems of 6 options a group (``layered_problem``, rank 8), one seed each for problem and sampler; the optimum
is proven by `miqp` first. Every sampler runs with its defaults, so that a table is the same on any machine but for
the processor time beside it; or, with ``--time-limit``, all for the same time. Distances from the optimum are of the
best sample as it came (raw), repaired and polished; a raw one is missing when no sample was valid and within the
budget. Beside them: the model's size, the share of runs that gave a feasible choice, of samples that were valid and of
decoded samples within the budget. Medians over the problems, the worst polished one in its own column. A second table:
what a quantum processor's precision would keep of the first problem's model.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.found import found
from benchmarks.tables import markdown, write_results
from formulations import Problem, to_bqm
from formulations.forms.bqm import ENCODINGS
from formulations.forms.precision import coefficient_report
from formulations.generators.random_instances import layered_problem
from solvers import Status, available, solve

SAMPLERS = ("sa", "sqa", "tabu", "steepest-descent", "bifurcation", "openjij")

COLUMNS = {
    "sampler": "sampler",
    "encoding": "encoding",
    "variables": "variables",
    "raw": "raw",
    "repaired": "repaired",
    "polished": "polished",
    "worst": "worst polished",
    "feasible": "feasible runs",
    "share_valid": "valid samples",
    "share_feasible_decoded": "within budget as decoded",
    "samples": "samples",
    "cpu_s": "processor time",
}

PRECISION = {
    "encoding": "encoding",
    "variables": "variables",
    "couplings": "couplings",
    "dynamic_range_bits": "span of coefficients, bits",
    "lost_couplings": "couplings lost at 5 bits",
    "moves_kept": "order kept of neighbours",
    "order_kept": "order kept of random choices",
}


def main() -> None:
    arguments = _arguments()
    here = {info.name for info in available() if info.available}
    asked = arguments.samplers.split(",")
    if missing := [name for name in asked if name not in here]:
        print(f"left out, not installed: {', '.join(missing)}")
    problems = [layered_problem(arguments.groups, seed=seed) for seed in range(arguments.problems)]
    optima = [proven(problem) for problem in problems]
    rows = []
    for sampler in (name for name in asked if name in here):
        for encoding in ENCODINGS:
            runs = [
                run(problem, optimum, sampler, encoding, seed, arguments.time_limit)
                for seed, (problem, optimum) in enumerate(zip(problems, optima, strict=True))
            ]
            rows.append(summary(sampler, encoding, runs))
            print(markdown([shown(rows[-1])], COLUMNS).splitlines()[-1], flush=True)
    precision = [precision_row(problems[0], encoding) for encoding in ENCODINGS]
    table = "\n".join(
        [
            f"{arguments.groups} groups × 6 options, rank 8, {arguments.problems} problems, "
            f"{f'{arguments.time_limit:g} s a run' if arguments.time_limit else 'defaults'}; "
            "distance from the proven optimum:",
            "",
            markdown([shown(row) for row in rows], COLUMNS),
            "",
            "What five bits of precision would keep of the first problem's model:",
            "",
            markdown([shown(row) for row in precision], PRECISION),
        ]
    )
    print("\n" + table)
    write_results(arguments.out, "qubo", {"runs": rows, "precision": precision}, table)


def proven(problem: Problem) -> float:
    """The optimum, proven."""
    solution = solve(problem, "miqp")
    assert solution.status is Status.OPTIMAL
    return found(solution).objective


def run(
    problem: Problem, optimum: float, sampler: str, encoding: str, seed: int, time_limit: float | None
) -> dict[str, Any]:
    """One run, its steps as distances from the optimum."""
    options: dict[str, Any] = {"rounds": 1000} if time_limit else {}  # the time ends it
    begun = time.process_time()
    solution = solve(problem, sampler, seed=seed, encoding=encoding, time_limit=time_limit, presolve=False, **options)
    cpu_s = time.process_time() - begun
    row = {name: solution.details[name] for name in ("share_valid", "share_feasible_decoded", "samples", "rounds")}
    row |= {"cpu_s": cpu_s, "feasible": solution.feasible, "prices": solution.details["prices"]}
    row["variables"] = to_bqm(problem, encoding, prices=solution.details["prices"]).bqm.num_variables
    for step in ("raw", "repaired", "polished"):
        value = solution.details[f"objective_{step}"]
        row[step] = None if value is None else value / optimum - 1
    return row


def summary(sampler: str, encoding: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the problems; a step that a run lacks counts as infinitely bad."""
    row: dict[str, Any] = {"sampler": sampler, "encoding": encoding, "runs": runs}
    for name in (
        "raw",
        "repaired",
        "polished",
        "share_valid",
        "share_feasible_decoded",
        "samples",
        "cpu_s",
        "variables",
    ):
        middle = statistics.median(float("inf") if run[name] is None else run[name] for run in runs)
        row[name] = None if middle == float("inf") else middle
    polished = [run["polished"] for run in runs]
    row["worst"] = None if None in polished else max(polished)
    row["feasible"] = statistics.mean(run["feasible"] for run in runs)
    return row


def precision_row(problem: Problem, encoding: str) -> dict[str, Any]:
    """How much of the model survives a quantum processor's precision, at the sampler's final prices."""
    prices = solve(problem, "sa", seed=0, encoding="domain-wall", presolve=False).details["prices"]
    return {"encoding": encoding} | coefficient_report(to_bqm(problem, encoding, prices=prices)).to_json()


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with shares in percent."""
    shares = (
        "raw", "repaired", "polished", "worst", "feasible", "share_valid", "share_feasible_decoded", "lost_couplings",
        "moves_kept", "order_kept",
    )  # fmt: skip
    texts = {name: f"{row[name]:.2%}" for name in shares if row.get(name) is not None}
    texts |= {name: f"{row[name]:.1f} s" for name in ("cpu_s",) if name in row}
    return row | texts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=5)
    parser.add_argument("--groups", type=int, default=50)
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="names, with commas between")
    parser.add_argument("--time-limit", type=float, help="seconds a run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
