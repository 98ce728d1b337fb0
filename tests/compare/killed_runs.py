"""A comparison killed at random moments and resumed from its journal, beside the uncut one, as JSON on stdout.

    python tests/compare/killed_runs.py FOLDER KILLS

A program of its own, for it forks: a child makes the comparison until a timer of processor time, which the child has
set to a random moment, ends it as a signal that nothing can catch or see coming; the next child resumes.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from formulations.generators.random_instances import layered_problem
from solvers.compare.runs import compare
from tests.compare.own_solvers import Dice

SEEDS = 24
SOLVERS = (Dice(rolls=200), "anneal:sweeps=40", "greedy")
PROBLEMS = {"pairs": layered_problem(12, rank=2), "linear": layered_problem(40, rank=0)}


def run(seeds, journal=None):
    return compare(PROBLEMS, SOLVERS, seeds=range(seeds), journal=journal)


def killed(seeds, journal, after_s):
    """Whether the timer ended a child that makes the comparison."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, after_s)
        run(seeds, journal)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def outcome(suite):
    """All of a suite but what a clock has a part in."""
    return {
        name: {
            label: [
                {
                    **{key: value for key, value in run.to_json().items() if key not in ("wall_s", "timing", "trace")},
                    "details": {key: value for key, value in run.details.items() if key != "cpu_s"},
                    "trace": [(point.objective, point.bound) for point in run.trace],
                }
                for run in runs
            ]
            for label, runs in comparison.solutions.items()
        }
        for name, comparison in suite.comparisons.items()
    }


def main():
    journal, rng = Path(sys.argv[1]) / "runs.jsonl", random.Random(0)  # noqa: S311
    run(seeds=1)  # everything is imported and compiled before the first fork
    start = time.process_time()
    whole = run(SEEDS)
    longest_s = (time.process_time() - start) / 20  # several runs, and the comparison lasts through most of the kills
    lines, kills, asked = [], 0, int(sys.argv[2])
    while kills < asked:
        kills += killed(SEEDS, journal, rng.uniform(0.001, longest_s))
        lines.append(journal.read_bytes().count(b"\n") if journal.exists() else 0)
    resumed = run(SEEDS, journal)
    print(json.dumps({"lines": lines, "resumed": outcome(resumed), "whole": outcome(whole)}))  # noqa: T201


if __name__ == "__main__":
    main()
