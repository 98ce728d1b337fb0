"""Run several solvers on one problem or many, each with several seeds.

`compare` runs the solvers, one after the other or in parallel processes, with a journal from which an interrupted
comparison resumes. Results and tables are in `solvers.compare.tables` and `solvers.compare.suite`, curves in
`solvers.compare.curves`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np

from formulations import InfeasibleBudgetError, Problem
from formulations.files import AnyPath
from solvers.base import Solver, SolverLike
from solvers.compare.curves import Curve, Profile, anytime, performance_profile
from solvers.compare.rows import ComparisonRow
from solvers.compare.suite import SUITE_KIND, Suite, SuiteRow
from solvers.compare.tables import FILE_KIND, TARGET, Comparison
from solvers.compare.time_to_target import TimeToTarget, time_to_target
from solvers.errors import InvalidOptionError, SolverError, SolverUnavailableError, UnsupportedProblemError, described
from solvers.journal import Journal, run_key
from solvers.processes import Lost, in_processes
from solvers.provenance import machine, processor_s, versions
from solvers.run import as_solver, solve
from solvers.solution import Solution, Status, StopReason
from solvers.validation import as_seed

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

Solvers = Iterable[SolverLike] | Mapping[str, SolverLike]
"""Solvers to compare; a mapping gives them labels."""

Values = float | Mapping[str, float] | None
"""An objective for one problem, or objectives by the names of several problems."""


class _Task(NamedTuple):
    """One run to be made."""

    name: str  # name of the problem
    label: str  # label of the solver
    problem: Problem
    solver: Solver
    seed: int
    time_limit: float | None


@overload
def compare(
    problem: Problem,
    solvers: Solvers,
    *,
    time_limit: float | None = ...,
    seeds: Iterable[int] = ...,
    best_known: Values = ...,
    target: Values = ...,
    within: float = ...,
    jobs: int = ...,
    journal: AnyPath | None = ...,
    on_run: OnRun | None = ...,
) -> Comparison: ...


@overload
def compare(
    problem: Mapping[str, Problem],
    solvers: Solvers,
    *,
    time_limit: float | None = ...,
    seeds: Iterable[int] = ...,
    best_known: Values = ...,
    target: Values = ...,
    within: float = ...,
    jobs: int = ...,
    journal: AnyPath | None = ...,
    on_run: OnRun | None = ...,
) -> Suite: ...


def compare(
    problem: Problem | Mapping[str, Problem],
    solvers: Solvers,
    *,
    time_limit: float | None = None,
    seeds: Iterable[int] = (0,),
    best_known: Values = None,
    target: Values = None,
    within: float = TARGET,
    jobs: int = 1,
    journal: AnyPath | None = None,
    on_run: OnRun | None = None,
) -> Comparison | Suite:
    """Run every solver with every seed on one problem, or on each of several.

    A failing run does not end the comparison: its Solution has no choice, and ``details["error"]`` describes the error.
    Nor does a problem with a budget below the smallest possible use of its resource: its runs are INFEASIBLE, and
    ``details["infeasible"]`` says why.
    With several jobs this also applies if the process of a run dies. The details of every Solution contain ``cpu_s``
    (processor time of the process and its child processes), ``machine`` and ``versions``.

    Args:
        problem: the problem to solve, or several problems by name.
        solvers: names, optionally with options as in ``"anneal:sweeps=200"``, import paths (see `solvers.solver_text`),
            `Solver` classes or instances, or dimod samplers. Solvers with the same name and options (such as two
            composites of the same class) need labels: ``{"gentle": one, "harsh": other}``.
        time_limit: time limit of every run in seconds.
        seeds: random seeds, with one run for each.
        best_known: an objective known from another source; gaps and targets refer to it unless a run is better.
        target: objective at or below which a run has reached its target; replaces ``within``.
        within: maximum distance from the best objective, known or found, at which a run has reached its target, as a
            fraction of that objective.
        jobs: number of runs at the same time, in separate processes (-1 for one per core), or on a cluster under
            ``joblib.parallel_config(backend="dask")`` or ``"ray"``. The runs share the cores and take longer than
            alone, so use 1 to compare times.
        journal: path of a file to which every finished run is written. Runs already in it (same problem, solver, label,
            options, time limit, seed and versions) are taken from there, and runs that ended with an error are
            repeated. Ctrl-C then ends the comparison, and the next call resumes it; without a journal Ctrl-C only ends
            the current run.
        on_run: function called with label and Solution after every new run; with several problems the label is
            ``"problem: solver"``.

    Raises:
        UnknownSolverError, InvalidOptionError: a solver is unknown or given twice, or there is nothing to run.
        FileFormatError: ``journal`` is not a journal file.

    >>> from formulations.generators.random_instances import layered_problem
    >>> comparison = compare(layered_problem(4), ["brute-force", "anneal:sweeps=20"], seeds=(0, 1))
    >>> [(row.label, row.feasible_share, row.gap, dict(row.statuses)) for row in comparison.rows()][0]
    ('brute-force', 1.0, 0.0, {'OPTIMAL': 2})
    """
    problems = dict(problem) if isinstance(problem, Mapping) else {"": problem}
    numbers = tuple(map(as_seed, seeds))
    back_ends = _labelled(solvers)
    _require_sense(problems, back_ends, numbers, jobs, within, time_limit)
    known, targets = _by_problem(problems, best_known, "best_known"), _by_problem(problems, target, "target")
    skipped = {name: _why_skipped(stated, back_ends) for name, stated in problems.items()}
    tasks = [
        _Task(name, label, stated, solver, seed, time_limit)
        for name, stated in problems.items()
        for label, solver in back_ends.items()
        if label not in skipped[name]
        for seed in numbers
    ]
    solved = _run_all(tasks, jobs, None if journal is None else Journal(journal), on_run)
    comparisons = {
        name: Comparison(
            problem_fingerprint=stated.fingerprint(),
            time_limit=time_limit,
            seeds=numbers,
            solutions={
                label: tuple(solved[name, label, seed] for seed in numbers)
                for label in back_ends
                if label not in skipped[name]
            },
            skipped=skipped[name],
            best_known=known.get(name),
            stated_target=targets.get(name),
            within=within,
        )
        for name, stated in problems.items()
    }
    return Suite(comparisons=comparisons) if isinstance(problem, Mapping) else comparisons[""]


def _labelled(solvers: Solvers) -> dict[str, Solver]:
    """Return label → solver.

    Raises:
        InvalidOptionError: two solvers have the same label.
    """
    if isinstance(solvers, Mapping):
        return {str(label): as_solver(solver) for label, solver in solvers.items()}
    if isinstance(solvers, str | Solver):
        raise InvalidOptionError(f"compare takes a list of solvers or a mapping of labels, found {solvers!r} alone")
    back_ends = [as_solver(solver) for solver in solvers]
    counts = Counter(solver.label for solver in back_ends)
    if twice := [label for label, count in counts.items() if count > 1]:
        raise InvalidOptionError(
            f"solvers must differ; given twice: {', '.join(twice)}; if they differ in other ways than name and "
            "options, give labels: {'first': …, 'second': …}, on the command line first=NAME"
        )
    return {solver.label: solver for solver in back_ends}


def _require_sense(
    problems: Mapping[str, Problem],
    back_ends: Mapping[str, Solver],
    seeds: tuple[int, ...],
    jobs: int,
    within: float,
    time_limit: float | None,
) -> None:
    """Check the arguments before anything runs."""
    if wrong := [type(stated).__name__ for stated in problems.values() if not isinstance(stated, Problem)]:
        raise InvalidOptionError(f"compare takes a formulations.Problem or several by name, found {wrong[0]}")
    if not back_ends or not seeds or not problems:
        raise InvalidOptionError(
            "compare needs at least one solver and one seed for at least one problem, "
            f"found {list(back_ends)}, {list(seeds)} and {len(problems)} problems"
        )
    if twice := [str(seed) for seed, count in Counter(seeds).items() if count > 1]:
        raise InvalidOptionError(f"seeds must differ; given twice: {', '.join(twice)}")
    if time_limit is not None and not (np.isfinite(time_limit) and time_limit > 0):
        raise InvalidOptionError(f"time_limit must be a positive number of seconds, found {time_limit!r}")
    if jobs == 0:
        raise InvalidOptionError("jobs must be a number of processes, or -1 for one per core; found 0")
    if not (np.isfinite(within) and within >= 0):
        raise InvalidOptionError(f"within must be a fraction of the best objective, 0 or more, found {within!r}")


def _by_problem(problems: Mapping[str, Problem], values: Values, what: str) -> dict[str, float]:
    """Return the given objectives by the names of their problems.

    Raises:
        InvalidOptionError: one number is given for several problems, or a problem is unknown.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        if len(problems) > 1:
            raise InvalidOptionError(
                f"several problems need {what} by name, found {values!r} for {', '.join(problems)}"
            )
        values = dict.fromkeys(problems, values)
    if unknown := [name for name in values if name not in problems]:
        raise InvalidOptionError(f"{what} names {', '.join(unknown)}; the problems are {', '.join(problems)}")
    objectives = {name: float(value) for name, value in values.items()}
    if odd := [name for name, value in objectives.items() if not np.isfinite(value)]:
        raise InvalidOptionError(f"{what} must be a finite objective, found {objectives[odd[0]]!r}")
    return objectives


def _run_all(
    tasks: list[_Task], jobs: int, journal: Journal | None, on_run: OnRun | None
) -> dict[tuple[str, str, int], Solution]:
    """Return the solution of every task by problem, label and seed, from the journal or from a run added to it."""
    solved: dict[tuple[str, str, int], Solution] = {}
    missing = []
    for task in tasks:
        value = None if journal is None else journal.get(_key(task))
        if value is None:
            missing.append(task)
        else:
            solved[task.name, task.label, task.seed] = Solution.from_json(value, "the journal")
    for task, outcome in _solved(missing, jobs):
        solution = replace(outcome, details={**outcome.details, "versions": versions(task.solver)})
        if journal is not None:
            if solution.stop_reason is StopReason.INTERRUPTED:
                raise KeyboardInterrupt
            if solution.stop_reason is not StopReason.ERROR_RECOVERED:
                journal.add(_key(task), solution.to_json())
        solved[task.name, task.label, task.seed] = solution
        if on_run is not None:
            on_run(f"{task.name}: {task.label}" if task.name else task.label, solution)
    return solved


def _solved(tasks: list[_Task], jobs: int) -> Iterator[tuple[_Task, Solution]]:
    """Yield every task with its solution, in the order of completion."""
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield task, _solve(task)
        return
    for number, outcome in in_processes(_solve, tasks, jobs):
        if isinstance(outcome, Lost):
            outcome = _failed(tasks[number], "the process of this run died in every attempt")
        yield tasks[number], outcome


def _solve(task: _Task) -> Solution:
    begun, processor_begun = time.perf_counter(), processor_s()
    try:
        solution = solve(task.problem, task.solver, time_limit=task.time_limit, seed=task.seed)
        _require_storable(solution)
    except InfeasibleBudgetError as error:
        why, wall_s = {"infeasible": str(error)}, time.perf_counter() - begun
        solution = _without_choice(task, StopReason.COMPLETED, wall_s, status=Status.INFEASIBLE, details=why)
    except (Exception, SystemExit) as error:  # the other runs continue after any error
        solution = _failed(task, described(error), time.perf_counter() - begun)
    recorded = {"cpu_s": processor_s() - processor_begun, "machine": machine()}
    return replace(solution, details={**solution.details, **recorded})


def _require_storable(solution: Solution) -> None:
    """Require that JSON can store a solution, to whose ``details`` a solver may add anything.

    Raises:
        SolverError: it cannot.
    """
    try:
        json.dumps(solution.to_json(), allow_nan=False, ensure_ascii=False).encode()
    except Exception as error:
        raise SolverError(f"JSON cannot store its result: {described(error)}") from error


def _failed(task: _Task, error: str, wall_s: float = 0.0) -> Solution:
    return _without_choice(task, StopReason.ERROR_RECOVERED, wall_s, status=Status.UNKNOWN, details={"error": error})


def _without_choice(
    task: _Task, stop_reason: StopReason, wall_s: float, *, status: Status, details: Mapping[str, Any]
) -> Solution:
    return Solution(
        choice=None,
        objective=None,
        usage={},
        feasible=False,
        bound=None,
        gap=None,
        status=status,
        stop_reason=stop_reason,
        wall_s=wall_s,
        solver=task.solver.name,
        seed=task.seed,
        options=task.solver.option_values,
        details=details,
        problem_fingerprint=task.problem.fingerprint(),
    )


def _key(task: _Task) -> dict[str, Any]:
    return {**run_key("compare", task.problem, task.solver, task.time_limit, task.seed), "label": task.label}


def _why_skipped(problem: Problem, back_ends: Mapping[str, Solver]) -> dict[str, str]:
    """Return label → reason for each solver that cannot run on the problem."""
    skipped = {}
    for label, solver in back_ends.items():
        try:
            solver.require(problem)
        except (SolverUnavailableError, UnsupportedProblemError) as error:
            skipped[label] = str(error)
    return skipped
