"""`compare` in parallel processes: the same answers in the same places. Apart, so that the processes load no torch."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from formulations.generators.random_instances import layered_problem
from solvers.compare.runs import compare
from solvers.journal import Journal, run_key
from tests.compare.own_solvers import Dice

ROOT = Path(__file__).parents[2]


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
            key = {**run_key("compare", problem, Dice(rolls=9), None, seed), "label": "dice(rolls=9)"}
            assert journal.get(key)["seed"] == seed


@pytest.mark.slow
def test_replaced_workers_do_not_end_the_run_where_warnings_are_errors():
    program = (
        "from solvers.processes import in_processes\n"
        "from tests.compare.test_parallel import outgrown\n"
        "print(sorted(in_processes(outgrown, range(12), 2)))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert run.stdout == f"{[(number, number) for number in range(12)]}\n", run.stderr


def outgrown(number):
    """The number; the worker then ends, as after growing by more than joblib allows."""
    limits = sys.modules["joblib.externals.loky.process_executor"]
    limits._MAX_MEMORY_LEAK_SIZE = limits._MEMORY_LEAK_CHECK_DELAY = -1
    return number


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_cluster_gives_the_same_answers(backend):
    joblib = pytest.importorskip("joblib")
    problem, seeds = layered_problem(5, rank=2), (0, 1, 2)
    alone = compare(problem, ["greedy", "anneal"], seeds=seeds, time_limit=5)
    with cluster(backend), joblib.parallel_config(backend=backend):
        spread = compare(problem, ["greedy", "anneal"], seeds=seeds, time_limit=5, jobs=2)
    for label, runs in alone.solutions.items():
        assert [run.objective for run in spread.solutions[label]] == [run.objective for run in runs]


@contextlib.contextmanager
def cluster(backend):
    """Two workers of a kind on this machine."""
    if backend == "dask":
        distributed = pytest.importorskip("distributed")
        workers = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        with workers, distributed.Client(workers):
            yield
        return
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    path = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=path)
    try:
        register_ray()
        yield
    finally:
        ray.shutdown()
