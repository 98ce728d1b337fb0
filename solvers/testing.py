"""The conformance suite: what every back end must do, as plain functions that anybody can run on their own solver.

    from solvers.testing import check_solver
    check_solver(MySolver)                      # a class, an instance, a registered name or any dimod sampler

Each ``check_…(solver)`` looks at one behaviour and raises `ConformanceError` with what was asked, what came and on
which problem. `checks_for` picks them by what the solver declares (``exact``, ``native_pairs``, ``deterministic``),
so a test suite can run them one by one. The oracle is every choice put before `Problem.evaluate`; an answer without
a choice never passes where one exists.
"""

import functools
import itertools
import json
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, PairTerms, Problem
from formulations.instances import layered_problem, small_problem
from solvers import registry
from solvers.base import Progress, Solver
from solvers.errors import InvalidOptionError, SolverError, SolverUnavailableError, UnsupportedProblemError
from solvers.run import as_solver, solve
from solvers.solution import Solution, Status, StopReason

NUM_RANDOM = 30
SCALES = (1e-12, 1e-6, 1e9)
TIME_LIMIT_S = 1.0
SEED = 11

Check = Callable[[Solver], None]


class ConformanceError(SolverError, AssertionError):
    """A solver does not do what every solver must."""


def check_solver(solver: Any) -> tuple[str, ...]:
    """Run every check that applies to ``solver``.

    Args:
        solver: a registered name, a `Solver` class or instance, or a dimod sampler.

    Returns:
        The names of the checks that were run; all of them passed.

    Raises:
        ConformanceError: lists every check that failed, and how.
        SolverUnavailableError: a package the solver needs is missing.

    >>> "check_interrupt_keeps_the_best" in check_solver("brute-force")
    True
    """
    back_end = as_solver(solver)
    if why := back_end.why_not():
        raise SolverUnavailableError(why)
    checks = checks_for(back_end)
    failures: list[str] = []
    first: Exception | None = None
    for check in checks:
        try:
            check(back_end)
        except Exception as error:  # whatever a solver breaks with is a finding; the others are still looked at
            said = str(error) if isinstance(error, ConformanceError) else f"raised {error!r}"
            failures.append(f"{check.__name__}: {said}")
            first = first or error
    if failures:
        lines = "\n  ".join(failures)
        summary = f"{len(failures)} of {len(checks)} checks failed for {back_end.name!r}"
        raise ConformanceError(f"{summary}:\n  {lines}") from first
    return tuple(check.__name__ for check in checks)


def checks_for(solver: Any) -> tuple[Check, ...]:
    """The checks that apply to a solver, by what it declares."""
    back_end = as_solver(solver)
    optional = (
        (check_equals_brute_force, back_end.exact),
        (check_pair_terms_are_refused, not back_end.native_pairs),
        (check_same_seed_same_answer, back_end.deterministic),
        (check_scale_changes_no_choice, back_end.deterministic),
    )
    return (*ALWAYS, *(check for check, applies in optional if applies))


# --- what the solver says about itself -----------------------------------------------------------------------------


def check_description(solver: Solver) -> None:
    """It has a name and a summary, and its options are listed with defaults that it accepts."""
    info = solver.info()
    _require(
        solver, bool(info.name) and info.name == info.name.strip(), f"its name must be a word, found {info.name!r}"
    )
    _require(solver, bool(info.summary), "its summary is empty; say in one line what it does")
    _require(solver, set(info.options) == set(solver.option_values), "info() must list exactly the options it has")
    again = registry.configured(solver, dict(solver.option_values))
    _require(solver, again.option_values == solver.option_values, "setting every option to its value changed one")
    known = {entry.name: entry for entry in registry.available()}
    if info.name in known and type(solver) is registry.solver_class(info.name):
        _require(solver, known[info.name] == info, "available() describes it differently")


def check_unknown_option_is_refused(solver: Solver) -> None:
    """An option it does not have raises InvalidOptionError and is never dropped."""
    try:
        solve(_first_taken(solver), solver, no_such_option=1)
    except InvalidOptionError as error:
        _require(solver, "no_such_option" in str(error), f"the error does not name the unknown option: {error}")
    else:
        _fail(solver, "accepted the unknown option no_such_option=1")


def check_pickle(solver: Solver) -> None:
    """A pickled copy has the same options and gives the same kind of answer (worker processes need this)."""
    try:
        copy = pickle.loads(pickle.dumps(solver))  # noqa: S301  (made on this very line)
    except Exception as error:
        raise ConformanceError(f"{solver.name}: cannot be pickled: {error!r}") from error
    _require(solver, copy.option_values == solver.option_values, "a pickled copy has other options")
    _judge(solver, _first_taken(solver), solve(_first_taken(solver), copy, seed=SEED))


# --- answers -------------------------------------------------------------------------------------------------------


def check_answers_are_sound(solver: Solver) -> None:
    """Objective, use and feasibility are `Problem.evaluate`'s; no bound above the optimum; no false proof."""
    for problem in _taken(solver, _random_problems(solver.native_pairs)):
        _judge(solver, problem, solve(problem, solver, seed=SEED))


def check_equals_brute_force(solver: Solver) -> None:
    """An exact solver proves the optimum of every small problem, or that there is none."""
    for problem in _taken(solver, _random_problems(solver.native_pairs)):
        best = optimum(problem)
        solution = solve(problem, solver, seed=SEED)
        wanted = Status.INFEASIBLE if best is None else Status.OPTIMAL
        _require(solver, solution.status is wanted, f"status {solution.status}, must be {wanted}", problem)
        if best is not None:
            _require(
                solver, _close(problem, solution.objective, best), f"{solution.objective}, optimum {best}", problem
            )
            _require(solver, solution.bound is not None, "OPTIMAL without a bound", problem)


def check_degenerate_problems(solver: Solver) -> None:
    """One group, one option, ties, zero costs, no resource, no budget, a budget met exactly, huge uses."""
    for problem in _taken(solver, _degenerate_problems()):
        _judge(solver, problem, solve(problem, solver, seed=SEED))


def check_impossible_budget_is_refused(solver: Solver) -> None:
    """A budget below the smallest use raises InfeasibleBudgetError with the resource, the asked and the smallest."""
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 7})
    try:
        solve(problem, solver)
    except InfeasibleBudgetError as error:
        missing = [word for word in ("bytes", "7", "8") if word not in str(error)]
        _require(solver, not missing, f"the error lacks {missing}: {error}")
    else:
        _fail(solver, "solved a problem whose budget no choice can meet", problem)


def check_budgets_that_clash(solver: Solver) -> None:
    """Budgets each reachable alone but not together: no choice, and INFEASIBLE from whoever claims to be exact."""
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    for one in _taken(solver, [problem]):
        solution = solve(one, solver, seed=SEED)
        _judge(solver, one, solution)
        if solver.exact:
            found = f"{solution.status}, {solution.stop_reason}"
            _require(solver, solution.status is Status.INFEASIBLE, f"must prove INFEASIBLE, said {found}", one)


def check_pair_terms_are_refused(solver: Solver) -> None:
    """A solver that declares ``native_pairs = False`` refuses pair terms and never ignores them."""
    pairs = PairTerms(factor=np.array([[1.0], [2.0], [3.0], [4.0]]))
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {}, {}, pairs)
    try:
        solve(problem, solver)
    except UnsupportedProblemError as error:
        _require(solver, "pair" in str(error), f"the error does not say that pair terms are the reason: {error}")
    else:
        _fail(solver, "declares native_pairs = False but solved a problem with pair terms")


# --- the course of a run -------------------------------------------------------------------------------------------


def check_time_limit(solver: Solver) -> None:
    """A run ends within the time limit plus 10 % plus one second, with a choice, and a cut run proves nothing."""
    problem = _largest_taken(solver)
    solve(problem, solver, seed=SEED, time_limit=TIME_LIMIT_S)  # imports and compilation are not counted
    allowed = TIME_LIMIT_S * 1.1 + 1.0
    walls: list[float] = []
    while len(walls) < 3 and min(walls, default=np.inf) > allowed:  # a busy machine may spoil one run, not three
        start = time.perf_counter()
        solution = solve(problem, solver, seed=SEED, time_limit=TIME_LIMIT_S)
        walls.append(time.perf_counter() - start)
        _require(solver, solution.choice is not None, "found no choice when its time was limited", problem)
        _judge_course(solver, problem, solution)
    found = f"took {min(walls):.2f} s with time_limit={TIME_LIMIT_S} (allowed: {allowed:.2f} s)"
    _require(solver, min(walls) <= allowed, found, problem)


def check_interrupt_keeps_the_best(solver: Solver) -> None:
    """Ctrl-C (a KeyboardInterrupt out of ``on_progress``) ends the run with the best so far."""
    problem = _largest_taken(solver)
    seen: list[float] = []

    def interrupt(progress: Progress) -> None:
        if progress.objective is not None:
            seen.append(progress.objective)
            raise KeyboardInterrupt

    try:
        solution = solve(problem, solver, seed=SEED, time_limit=20.0, on_progress=interrupt)
    except KeyboardInterrupt as error:
        raise ConformanceError(f"{solver.name}: let KeyboardInterrupt through, the best so far is lost") from error
    _require(solver, bool(seen), "never told on_progress about a choice it found", problem)
    reason = solution.stop_reason
    _require(solver, reason is StopReason.INTERRUPTED, f"stop reason must be INTERRUPTED, found {reason}", problem)
    _require(solver, solution.objective is not None, "lost the choice it had when it was interrupted", problem)
    _require(solver, solution.objective <= min(seen), "gave back a worse choice than it had", problem)  # type: ignore[operator]
    _judge_course(solver, problem, solution)


def check_errors_of_on_progress_surface(solver: Solver) -> None:
    """An exception in the caller's ``on_progress`` reaches the caller."""

    class CallerError(Exception):
        pass

    def fail(_: Progress) -> None:
        raise CallerError

    try:
        solve(_first_taken(solver), solver, seed=SEED, on_progress=fail)
    except CallerError:
        return
    _fail(solver, "swallowed an exception raised by on_progress (or never called it)")


def check_same_seed_same_answer(solver: Solver) -> None:
    """Two runs with one seed give the same choice; a solver that cannot says ``deterministic = False``."""
    for problem in _taken(solver, [_middle_problem(solver.native_pairs), *_random_problems(solver.native_pairs)[:5]]):
        first, second = (solve(problem, solver, seed=SEED) for _ in range(2))
        found = f"{_listed(first.choice)} and {_listed(second.choice)} from seed {SEED}"
        _require(solver, _listed(first.choice) == _listed(second.choice), found, problem)


def check_scale_changes_no_choice(solver: Solver) -> None:
    """Cost and pair terms multiplied by 1e-12 … 1e9 give the same choice."""
    for problem in _taken(solver, [_middle_problem(solver.native_pairs)]):
        reference = _listed(solve(problem, solver, seed=SEED).choice)
        for scale in SCALES:
            choice = _listed(solve(problem.scaled(scale), solver, seed=SEED).choice)
            found = f"objective times {scale:g} changed the choice from {reference} to {choice}"
            _require(solver, choice == reference, found, problem)


def check_initial_is_used(solver: Solver) -> None:
    """Never worse than a feasible ``initial``; an infeasible one is no reason to fail."""
    for problem in _taken(solver, [p for p in _random_problems(solver.native_pairs) if optimum(p) is not None][:6]):
        choices = list(_all_choices(problem))
        judged = [problem.evaluate(choice) for choice in choices]
        feasible = [at for at, one in enumerate(judged) if one.feasible]
        best = min(feasible, key=lambda at: judged[at].objective)
        solution = solve(problem, solver, seed=SEED, initial=choices[best])
        _judge(solver, problem, solution)
        _require(solver, _close(problem, solution.objective, judged[best].objective), "worse than initial", problem)
        if broken := [at for at, one in enumerate(judged) if not one.feasible]:
            _judge(solver, problem, solve(problem, solver, seed=SEED, initial=choices[broken[0]]))


def check_inputs_are_unchanged(solver: Solver) -> None:
    """Problem, ``initial`` and the solver's own options are the same after a run."""
    problem = _first_taken(solver)
    fingerprint, options = problem.fingerprint(), dict(solver.option_values)
    initial = np.zeros(problem.num_groups, dtype=np.int64)
    solve(problem, solver, seed=SEED, initial=initial)
    _require(solver, problem.fingerprint() == fingerprint, "changed the problem", problem)
    _require(solver, not initial.any(), "changed the caller's initial choice", problem)
    _require(solver, dict(solver.option_values) == options, "changed its own options")


ALWAYS: tuple[Check, ...] = (
    check_description,
    check_unknown_option_is_refused,
    check_pickle,
    check_answers_are_sound,
    check_degenerate_problems,
    check_impossible_budget_is_refused,
    check_budgets_that_clash,
    check_time_limit,
    check_interrupt_keeps_the_best,
    check_errors_of_on_progress_surface,
    check_initial_is_used,
    check_inputs_are_unchanged,
)


# --- the judges ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)  # problems hash by identity; the suite asks again and again for the same ones
def optimum(problem: Problem) -> float | None:
    """The least objective of a small problem by trying every choice, or None when none is feasible.

    >>> optimum(Problem(["a"], [["x", "y"]], [2.0, 1.0], {"bytes": [1, 2]}, {"bytes": 1}))
    2.0
    """
    judged = (problem.evaluate(choice) for choice in _all_choices(problem))
    return min((one.objective for one in judged if one.feasible), default=None)


def _judge(solver: Solver, problem: Problem, solution: Solution) -> None:
    """Everything that must hold of an answer to a small problem."""
    _judge_course(solver, problem, solution)
    best = optimum(problem)
    if best is None:
        _require(solver, solution.choice is None, "a choice for a problem that has none", problem)
        return
    if len(problem.budgets) <= 1 or solver.exact:  # several budgets together may defeat a heuristic, one may not
        _require(solver, solution.choice is not None, f"no choice, though one exists ({solution.status})", problem)
    _require(solver, solution.status is not Status.INFEASIBLE, "called a feasible problem INFEASIBLE", problem)
    for bound in (solution.bound, *(point.bound for point in solution.trace)):
        sound = bound is None or bound <= best or _close(problem, bound, best)
        _require(solver, sound, f"bound {bound!r} lies above the optimum {best!r}", problem)
    if solution.status is Status.OPTIMAL:
        found = f"called {solution.objective!r} OPTIMAL, the optimum is {best!r}"
        _require(solver, _close(problem, solution.objective, best), found, problem)


def _judge_course(solver: Solver, problem: Problem, solution: Solution) -> None:
    """What must hold of every answer, however large the problem."""
    if solution.choice is None:
        empty = solution.objective is None and not solution.feasible and solution.gap is None
        _require(solver, empty, "no choice, but an objective", problem)
        sober = solution.status in (Status.INFEASIBLE, Status.UNKNOWN)
        _require(solver, sober, f"status {solution.status} without a choice", problem)
    else:
        judged = problem.evaluate(solution.choice)
        _require(solver, judged.feasible, f"over budget by {judged.violations}", problem)
        same = (solution.objective, solution.usage, solution.feasible) == (judged.objective, judged.usage, True)
        _require(solver, same, f"says {solution.objective}, {solution.usage}; evaluate says {judged}", problem)
        positive = solution.status in (Status.OPTIMAL, Status.FEASIBLE)
        _require(solver, positive, f"status {solution.status} with a feasible choice", problem)
    origin = (solution.solver, solution.problem_fingerprint)
    _require(solver, origin == (solver.name, problem.fingerprint()), "does not say whose answer it is", problem)
    for name, values in (("time", [p.t_s for p in solution.trace]), ("bound", [p.bound for p in solution.trace])):
        known = [value for value in values if value is not None]
        _require(solver, known == sorted(known), f"the trace's {name} goes down", problem)
    objectives = [point.objective for point in solution.trace if point.objective is not None]
    _require(solver, objectives == sorted(objectives, reverse=True), "the trace's objective goes up", problem)
    for choice, objective in solution.pool:
        judged = problem.evaluate(choice)
        sound = judged.feasible and _close(problem, judged.objective, objective)
        _require(solver, sound, f"its pool holds {choice} at {objective}; evaluate says {judged}", problem)
    try:
        json.dumps(solution.to_json(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConformanceError(f"{solver.name}: its answer cannot be saved as JSON: {error}") from error


def _close(problem: Problem, found: float | None, wanted: float) -> bool:
    size = 1e-300 + abs(wanted) + float(np.abs(problem.cost).max()) * problem.num_groups
    return found is not None and abs(found - wanted) <= 1e-9 * size


def _require(solver: Solver, holds: bool, found: str, problem: Problem | None = None) -> None:
    if not holds:
        _fail(solver, found, problem)


def _fail(solver: Solver, found: str, problem: Problem | None = None) -> None:
    raise ConformanceError(f"{solver.name}: {found}" + (f" [on {problem!r}]" if problem is not None else ""))


# --- the problems --------------------------------------------------------------------------------------------------


@functools.cache
def _random_problems(pairs: bool) -> tuple[Problem, ...]:
    """Small problems of every kind; without pair terms when the solver takes none."""
    drawn = (small_problem(seed, max_groups=5, max_options=3) for seed in range(NUM_RANDOM))
    return tuple(problem if pairs else _without_pairs(problem) for problem in drawn)


@functools.cache
def _middle_problem(pairs: bool) -> Problem:
    """Too large to try by hand, small enough for everybody; without ties."""
    return layered_problem(7, bits=(2, 4, 8), rank=2 if pairs else 0, seed=5)


@functools.cache
def _degenerate_problems() -> tuple[Problem, ...]:
    one, two = ["a"], ["a", "b"]
    xy = ["x", "y"]
    return (
        Problem(one, [["x"]], [3.0], {}, {}),
        Problem(one, [["x"]], [3.0], {"bytes": [7]}, {"bytes": 7}),
        Problem(one, [["x", "y", "z"]], [3.0, -1.0, 2.0], {}, {}),
        Problem(one, [xy], [0.0, 0.0], {"bytes": [1, 1]}, {"bytes": 1}),
        Problem(two, [["x"], ["x"]], [1.0, 2.0], {"bytes": [1, 2]}, {"bytes": 3}, offset=-3.0),
        Problem(two, [xy, xy], [0, 0, 0, 0], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}),
        Problem(two, [xy, xy], [1, 1, 1, 1], {}, {}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [2, 1, 2, 1]}, {}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [0, 0, 0, 0]}, {"bytes": 0}),
        Problem(two, [xy, xy], [0, 1, 0, 1], {"bytes": [2e12, 1e12, 2e12, 1e12]}, {"bytes": 3e12}),
        Problem(two, [xy, xy], [-5, -6, -5, -6], {"bytes": [1, 2, 1, 2]}, {"bytes": 3}, offset=100.0),
        Problem(two, [xy, xy], [1e-9, 1e6, 2e-9, 2e6], {"bytes": [2, 1, 2, 1]}, {"bytes": 3}),
    )


@functools.cache
def _large_problems(pairs: bool) -> tuple[Problem, ...]:
    """From hard to easy, for what must be seen while a solver works."""
    sizes = (300, 60, 20, 10)
    forms = ((8, 0), (8, 3)) if pairs else ((0, 0),)
    layered = [layered_problem(size, rank=rank, degree=degree, seed=3) for size in sizes for rank, degree in forms]
    return (*layered, *(layered_problem(size, bits=(2, 4, 8), rank=2 if pairs else 0, seed=3) for size in (10, 7)))


def _without_pairs(problem: Problem) -> Problem:
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    return Problem(problem.groups, problem.options, problem.cost, resources, budgets, offset=problem.offset)


def _taken(solver: Solver, problems: Any) -> Iterator[Problem]:
    """The problems that the solver does not refuse; at least one of them."""
    refusals = [solver.refuse(problem) for problem in problems]
    _require(solver, not all(refusals), f"refuses every small problem: {refusals[0] if refusals else ''}")
    return (problem for problem, refusal in zip(problems, refusals, strict=True) if not refusal)


def _first_taken(solver: Solver) -> Problem:
    return next(_taken(solver, _random_problems(solver.native_pairs)))


def _largest_taken(solver: Solver) -> Problem:
    return next(_taken(solver, _large_problems(solver.native_pairs)))


def _all_choices(problem: Problem) -> Iterator[NDArray[np.int64]]:
    return (np.array(choice) for choice in itertools.product(*(range(len(group)) for group in problem.options)))


def _listed(choice: NDArray[np.int64] | None) -> list[int] | None:
    return None if choice is None else choice.tolist()
