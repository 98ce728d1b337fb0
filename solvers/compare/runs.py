"""Run several solvers on one problem or many, each with several seeds.

`compare` only runs them, one after the other or in parallel processes, with a journal from which a cut comparison
goes on. What came out, with its tables, is in `solvers.compare.tables`, curves in `solvers.compare.curves`.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, overload

from formulations import Problem
from formulations.files import AnyPath
from solvers.base import Solver, SolverLike
from solvers.compare.curves import Curve, Profile, anytime, performance_profile
from solvers.compare.tables import FILE_KIND, SUITE_KIND, TARGET, Comparison, ComparisonRow, Suite, SuiteRow
from solvers.compare.time_to_target import TimeToTarget, time_to_target
from solvers.errors import InvalidOptionError, SolverUnavailableError, UnsupportedProblemError
from solvers.journal import Journal, run_key
from solvers.run import as_solver, solve
from solvers.solution import Solution, Status, StopReason

__all__ = [
    "FILE_KIND",
    "SUITE_KIND",
    "TARGET",
    "Comparison",
    "Curve",
    "Profile",
    "ComparisonRow",
    "Suite",
    "SuiteRow",
    "TimeToTarget",
    "anytime",
    "compare",
    "performance_profile",
    "time_to_target",
]

OnRun = Callable[[str, Solution], None]


class _Task(NamedTuple):
    """One run that is to be made."""

    name: str  # of the problem
    label: str  # of the solver
    problem: Problem
    solver: Solver
    seed: int


@overload
def compare(
    problem: Problem,
    solvers: Iterable[SolverLike],
    *,
    time_limit: float | None = ...,
    seeds: Iterable[int] = ...,
    jobs: int = ...,
    journal: AnyPath | None = ...,
    on_run: OnRun | None = ...,
) -> Comparison: ...


@overload
def compare(
    problem: Mapping[str, Problem],
    solvers: Iterable[SolverLike],
    *,
    time_limit: float | None = ...,
    seeds: Iterable[int] = ...,
    jobs: int = ...,
    journal: AnyPath | None = ...,
    on_run: OnRun | None = ...,
) -> Suite: ...


def compare(
    problem: Problem | Mapping[str, Problem],
    solvers: Iterable[SolverLike],
    *,
    time_limit: float | None = None,
    seeds: Iterable[int] = (0,),
    jobs: int = 1,
    journal: AnyPath | None = None,
    on_run: OnRun | None = None,
) -> Comparison | Suite:
    """Run every solver with every seed on one problem, or on each of several.

    A failing run does not end the comparison: its Solution has no choice, and ``details["error"]`` says what happened.

    Args:
        problem: what to solve, or several problems by name.
        solvers: names, `Solver` classes or instances (which may differ in their options), dimod samplers.
        time_limit: seconds for every run.
        seeds: one run for each.
        jobs: runs at the same time, each in a process of its own (-1: as many as there are cores), or on a cluster
            under ``joblib.parallel_config(backend="dask")`` or ``"ray"``. They share the
            cores, so that times are longer than of a run alone; leave 1 where times are what is compared.
        journal: a file that every run is written to as it ends. Runs that are in it already (same problem, solver,
            options, time limit and seed) are taken from there, those that an error ended are made again. Ctrl-C then
            ends the comparison, and the next call resumes it; without a journal Ctrl-C only ends the current run.
        on_run: called with label and Solution after every run that was made; with several problems the label is
            ``"problem: solver"``.

    Raises:
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.
        UnknownSolverError, InvalidOptionError: no such solver, the same one twice, or nothing to run.
        FileFormatError: ``journal`` is no journal.

    >>> from formulations.generators.random_instances import layered_problem
    >>> comparison = compare(layered_problem(4), ["brute-force"], seeds=(0, 1))
    >>> [(row.label, row.feasible_share, row.gap, dict(row.statuses)) for row in comparison.rows()]
    [('brute-force', 1.0, 0.0, {'OPTIMAL': 2})]
    """
    problems = dict(problem) if isinstance(problem, Mapping) else {"": problem}
    if wrong := [type(stated).__name__ for stated in problems.values() if not isinstance(stated, Problem)]:
        raise InvalidOptionError(f"compare takes a formulations.Problem or several by name, found {wrong[0]}")
    back_ends = [as_solver(solver) for solver in solvers]
    numbers = tuple(int(seed) for seed in seeds)
    labels = [solver.label for solver in back_ends]
    if not back_ends or not numbers or not problems:
        raise InvalidOptionError(
            "compare needs at least one solver and one seed for at least one problem, "
            f"found {labels}, {list(numbers)} and {len(problems)} problems"
        )
    if twice := [str(name) for name, count in Counter([*labels, *numbers]).items() if count > 1]:
        raise InvalidOptionError(f"solvers and seeds must differ; given twice: {', '.join(twice)}")
    if jobs == 0:
        raise InvalidOptionError("jobs must be a number of processes, or -1 for one a core; found 0")
    for stated in problems.values():
        stated.require_reachable_budgets()
    skipped = {name: _why_skipped(stated, labels, back_ends) for name, stated in problems.items()}
    tasks = [
        _Task(name, label, stated, solver, seed)
        for name, stated in problems.items()
        for label, solver in zip(labels, back_ends, strict=True)
        if label not in skipped[name]
        for seed in numbers
    ]
    solved = _run_all(tasks, time_limit, jobs, None if journal is None else Journal(journal), on_run)
    comparisons = {
        name: Comparison(
            problem_fingerprint=stated.fingerprint(),
            time_limit=time_limit,
            seeds=numbers,
            solutions={
                label: tuple(solved[name, label, seed] for seed in numbers)
                for label in labels
                if label not in skipped[name]
            },
            skipped=skipped[name],
        )
        for name, stated in problems.items()
    }
    return Suite(comparisons=comparisons) if isinstance(problem, Mapping) else comparisons[""]


def _run_all(
    tasks: list[_Task], time_limit: float | None, jobs: int, journal: Journal | None, on_run: OnRun | None
) -> dict[tuple[str, str, int], Solution]:
    """The solution of every task by problem, label and seed: read from the journal, or run and added to it."""
    solved: dict[tuple[str, str, int], Solution] = {}
    missing = []
    for task in tasks:
        value = None if journal is None else journal.get(_key(task, time_limit))
        if value is None:
            missing.append(task)
        else:
            solved[task.name, task.label, task.seed] = Solution.from_json(value, "the journal")
    for task, solution in _solved(missing, time_limit, jobs):
        if journal is not None:
            if solution.stop_reason is StopReason.INTERRUPTED:
                raise KeyboardInterrupt
            if solution.stop_reason is not StopReason.ERROR_RECOVERED:
                journal.add(_key(task, time_limit), solution.to_json())
        solved[task.name, task.label, task.seed] = solution
        if on_run is not None:
            on_run(f"{task.name}: {task.label}" if task.name else task.label, solution)
    return solved


def _solved(tasks: list[_Task], time_limit: float | None, jobs: int) -> Iterator[tuple[_Task, Solution]]:
    """Every task with its solution, in the order they end."""
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, _solve(task, time_limit)
        return
    import joblib  # here: it takes a while, and one process needs none

    backend = joblib.parallel.get_active_backend()[0]
    at_once = getattr(backend, "supports_return_generator", False)  # Ray gives all back at the end
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered" if at_once else "list")
    numbered = parallel(joblib.delayed(_solve_numbered)(number, task, time_limit) for number, task in enumerate(tasks))
    for number, solution in numbered:
        yield tasks[number], solution


def _solve_numbered(number: int, task: _Task, time_limit: float | None) -> tuple[int, Solution]:
    return number, _solve(task, time_limit)


def _solve(task: _Task, time_limit: float | None) -> Solution:
    begun = time.perf_counter()
    try:
        return solve(task.problem, task.solver, time_limit=time_limit, seed=task.seed)
    except Exception as error:  # whatever a solver fails with, the others are still compared
        return Solution(
            choice=None,
            objective=None,
            usage={},
            feasible=False,
            bound=None,
            gap=None,
            status=Status.UNKNOWN,
            stop_reason=StopReason.ERROR_RECOVERED,
            wall_s=time.perf_counter() - begun,
            solver=task.solver.name,
            seed=task.seed,
            options=task.solver.option_values,
            details={"error": f"{type(error).__name__}: {error}"},
            problem_fingerprint=task.problem.fingerprint(),
        )


def _key(task: _Task, time_limit: float | None) -> dict[str, Any]:
    return run_key("compare", task.problem, task.solver, time_limit, task.seed)


def _why_skipped(problem: Problem, labels: list[str], back_ends: list[Solver]) -> dict[str, str]:
    """Label → why the solver cannot run on the problem, for each solver that cannot."""
    skipped = {}
    for label, solver in zip(labels, back_ends, strict=True):
        try:
            solver.require(problem)
        except (SolverUnavailableError, UnsupportedProblemError) as error:
            skipped[label] = str(error)
    return skipped
