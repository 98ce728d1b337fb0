"""Random small problems through every exact back end, each answer judged against all choices put before `evaluate`.

Problem ``n`` is ``formulations.generators.random_instances.small_problem(n)``; every third one has its objective
multiplied by a power of ten between 1e-12 and 1e9. Those below 0 are the degenerate problems of the conformance suite.
Every installed back end that calls itself exact takes part, `milp` by HiGHS and by CBC, and so do `auto` and
`lagrangian`, each without and with presolve. What must hold: where the back end is exact the status is OPTIMAL or
INFEASIBLE, whichever is true; no bound lies above the optimum; no choice is over a budget; the objective is
`evaluate`'s. Objectives and bounds are compared to 1e-9 of the costs' size. A run of more than a minute is cut and
counted apart: it may know less.

    python -m benchmarks.fuzz [--first N] [--problems N] [--jobs N] [--only NAME] [--every NAME=N] [--out FOLDER]

The results so far are always in the folder, and a run that was cut says where to go on. A slow back end may take every
n-th problem only; the table says how many each took. The exit status is 1 when anything failed.
"""

import argparse
import functools
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.tables import markdown, write_results
from formulations import InfeasibleBudgetError, Problem
from formulations.generators.random_instances import small_problem
from formulations.reductions.scaling import scaled
from solvers import Solver, Status, StopReason, available, solve
from solvers.registry import configured
from solvers.run import as_solver
from solvers.testing import optimum
from solvers.testing.judge import close, judge_answer, require
from solvers.testing.problems import degenerate_problems

SOUND = ("auto", "lagrangian")
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"milp": ({"backend": "highs"}, {"backend": "cbc"})}
CHUNK = 20
TIME_LIMIT_S = 60.0
CUT = "cut"
COLUMNS = {"solver": "back end", "problems": "problems", "failures": "failures", "cut": "cut", "ms": "time each [ms]"}

Run = tuple[str, float, str]
"""Back end, seconds, and what it did wrong, or an empty string."""


def main() -> None:
    arguments = _arguments()
    numbers = range(arguments.first, arguments.problems)
    chunks = [numbers[first : first + CHUNK] for first in range(0, len(numbers), CHUNK)]
    look = functools.partial(judge_chunk, only=arguments.only, every=dict(arguments.every))
    tally, done = Tally(), arguments.first
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool, Progress() as progress:
        bar = progress.add_task("", total=len(numbers))
        try:
            for chunk, runs in zip(chunks, pool.map(look, chunks), strict=True):
                for number, run in runs:
                    tally.add(number, run)
                done = chunk[-1] + 1
                tally.write(arguments.out, arguments.first, done)
                progress.update(bar, advance=len(chunk), description=f"{len(tally.failures)} failures")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    print(tally.table(), *tally.failures, sep="\n")
    print(
        f"problems {arguments.first} to {done - 1}" + ("" if done >= numbers.stop else f"; go on with --first {done}")
    )
    if tally.failures:
        raise SystemExit(1)


class Tally:
    """Outcomes so far, by back end."""

    def __init__(self) -> None:
        self.problems, self.failed, self.cut = (Counter[str]() for _ in range(3))
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.failures: list[str] = []

    def add(self, number: int, run: Run) -> None:
        solver, seconds, wrong = run
        self.problems[solver] += 1
        self.seconds[solver] += seconds
        if wrong == CUT:
            self.cut[solver] += 1
        elif wrong:
            self.failed[solver] += 1
            self.failures.append(f"problem {number}: {wrong}")

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "solver": name,
                "problems": count,
                "failures": self.failed[name],
                "cut": self.cut[name],
                "ms": 1e3 * self.seconds[name] / count,
            }
            for name, count in self.problems.items()
        ]

    def table(self) -> str:
        return markdown(self.rows(), COLUMNS)

    def write(self, folder: Path, first: int, end: int) -> None:
        values = {"first": first, "end": end, "rows": self.rows(), "failures": self.failures}
        write_results(folder, "fuzz", values, self.table())


def problem_of(number: int) -> Problem:
    """The problem with this number."""
    if number < 0:
        return degenerate_problems()[number]
    problem = small_problem(number)
    if number % 3:
        return problem
    return scaled(problem, 10.0 ** float(np.random.default_rng(number).integers(-12, 10))).problem


def judge_chunk(numbers: range, only: list[str], every: dict[str, int]) -> list[tuple[int, Run]]:
    """Run every back end on some problems."""
    runs = []
    for number in numbers:
        problem = problem_of(number)
        for name, solver in back_ends():
            if (not only or name in only) and number % every.get(name, 1) == 0 and not solver.refuse(problem):
                start = time.perf_counter()
                wrong = judged(solver, problem)
                runs.append((number, (name, time.perf_counter() - start, wrong)))
    return runs


@functools.cache
def back_ends() -> tuple[tuple[str, Solver], ...]:
    """Every back end that takes part, with its name in the table."""
    return tuple(_back_ends())


def _back_ends() -> Iterator[tuple[str, Solver]]:
    for info in available():
        if info.available and not info.needs_network and (info.exact or info.name in SOUND):
            for options in VARIANTS.get(info.name, ({},)):
                yield " ".join([info.name, *options.values()]), configured(as_solver(info.name), options)


def judged(solver: Solver, problem: Problem) -> str:
    """Describe what is wrong with a back end's answer to a problem; an empty string if nothing is."""
    best = optimum(problem)
    try:
        for presolve in (False, True):  # most of these problems are decided by presolve
            solution = solve(problem, solver, seed=0, time_limit=TIME_LIMIT_S, presolve=presolve)
            judge_answer(solver, problem, solution)
            if solution.stop_reason is StopReason.TIME_LIMIT:
                return CUT
            if solver.exact:
                wanted = Status.INFEASIBLE if best is None else Status.OPTIMAL
                require(solver, solution.status is wanted, f"status {solution.status}, must be {wanted}", problem)
            if best is not None and solver.exact:
                same = close(problem, solution.objective, best)
                require(solver, same, f"{solution.objective}, optimum {best}", problem)
    except InfeasibleBudgetError:
        return "" if best is None else f"{solver.name}: refused, though the optimum is {best}"
    except Exception as error:  # whatever a solver breaks with is a finding
        return f"{solver.name}: {error!r}"
    return ""


def _share(entry: str) -> tuple[str, int]:
    name, _, count = entry.partition("=")
    return name, int(count)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=-len(degenerate_problems()), help="number of the first problem")
    parser.add_argument("--problems", type=int, default=1000, help="number after the last problem's")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", action="append", default=[], help="a back end of the table; may be given again")
    parser.add_argument("--every", action="append", type=_share, default=[], help="NAME=N: every N-th problem only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
