"""`compare` in parallel processes: the same answers in the same places. Apart, so that the processes load no torch."""

from dataclasses import dataclass

import numpy as np

from formulations.generators.random_instances import layered_problem
from solvers import Solver
from solvers.compare.runs import compare
from solvers.journal import Journal, run_key


@dataclass(frozen=True)
class Dice(Solver):
    name = "dice"
    summary = "random choices"

    rolls: int = 5

    def run(self, problem, search):
        search.offer([0] * problem.num_groups)
        for _ in range(self.rolls):
            search.offer(search.rng.integers(0, np.diff(problem.group_offsets)))


def test_parallel_processes_give_the_same_answers_and_write_the_same_journal(tmp_path):
    problems = {"one": layered_problem(5, rank=2), "linear": layered_problem(300, rank=0)}
    solvers, seeds, told = [Dice, Dice(rolls=9)], (0, 1, 2), []
    parallel = compare(
        problems, solvers, seeds=seeds, jobs=2, journal=tmp_path / "runs", on_run=lambda label, _: told.append(label)
    )
    assert sorted(told) == sorted(
        ["one: dice", "one: dice(rolls=9)", "linear: dice", "linear: dice(rolls=9)"] * len(seeds)
    )
    alone = compare(problems, solvers, seeds=seeds)
    for name, comparison in parallel.comparisons.items():
        for label, runs in comparison.solutions.items():
            assert [run.seed for run in runs] == list(seeds)
            assert [run.choice.tolist() for run in runs] == [
                run.choice.tolist() for run in alone[name].solutions[label]
            ]
    journal = Journal(tmp_path / "runs")
    for problem in problems.values():
        for seed in seeds:
            assert journal.get(run_key("compare", problem, Dice(rolls=9), None, seed))["seed"] == seed
