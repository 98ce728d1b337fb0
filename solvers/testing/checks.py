"""The checks, one plain function per behaviour, each of which raises `ConformanceError` if the behaviour is wrong.

All checks except one run the back end without presolve, so that it solves the whole problem itself.
"""

import pickle
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, PairTerms, Problem
from formulations.reductions.scaling import scaled
from solvers import registry, run
from solvers.base import Progress, Solver, SolverLike
from solvers.errors import InvalidOptionError, UnsupportedProblemError
from solvers.option_types import annotations, fits
from solvers.solution import Solution, Status, StopReason
from solvers.testing.cut_runs import check_cut_runs_claim_nothing_false
from solvers.testing.judge import (
    ConformanceError,
    all_choices,
    close,
    fail,
    judge_answer,
    judge_claims,
    judge_course,
    optimum,
    require,
)
from solvers.testing.problems import (
    degenerate_problems,
    first_taken,
    in_other_units,
    known_problems,
    largest_taken,
    middle_problem,
    paired_problems,
    random_problems,
    taken,
)

SCALES = (1e-12, 1e-6, 1e9)
UNITS = (2.0**-30, 2.0**30)  # powers of two, so that even rounding does not differ
TIME_LIMIT_S = 0.5
SPIN_S = 0.1
SEED = 11

Check = Callable[[Solver], None]


def solve(problem: Problem, solver: SolverLike, **options: Any) -> Solution:
    """Call `solvers.solve` without presolve."""
    solution: Solution = run.solve(problem, solver, presolve=False, **options)
    return solution


# --- the description of the solver ---------------------------------------------------------------------------------


def check_description(solver: Solver) -> None:
    """Check that the solver has a name and a summary, and lists its options with defaults that it accepts."""
    info = solver.info()
    require(
        solver, bool(info.name) and info.name == info.name.strip(), f"its name must be one word, found {info.name!r}"
    )
    bases = type(solver).__mro__[1:]
    known = {name for base in bases for name, value in vars(base).items() if isinstance(value, bool)}
    stated = {name for name, value in vars(type(solver)).items() if isinstance(value, bool)}
    unknown = sorted(stated - known - set(info.options) - {name for name in stated if name.startswith("_")})
    listed = f"{', '.join(unknown)}: no such property of a solver; there are {', '.join(sorted(known))}"
    require(solver, not unknown, listed)
    require(solver, bool(info.summary), "its summary is empty; describe it in one line")
    require(solver, set(info.options) == set(solver.option_values), "info() must list exactly the solver's options")
    again = registry.configured(solver, dict(solver.option_values))
    require(
        solver,
        again.option_values == solver.option_values,
        "setting every option to its present value changed an option",
    )
    registered = {entry.name: entry for entry in registry.available()}
    if info.name in registered and type(solver) is registry.solver_class(info.name):
        require(solver, registered[info.name] == info, "available() describes it differently")


def check_unknown_option_is_refused(solver: Solver) -> None:
    """Check that an unknown option raises InvalidOptionError and is never ignored."""
    try:
        solve(first_taken(solver), solver, no_such_option=1)
    except InvalidOptionError as error:
        require(solver, "no_such_option" in str(error), f"the error does not name the unknown option: {error}")
    else:
        fail(solver, "accepted the unknown option no_such_option=1")


def check_option_limits(solver: Solver) -> None:
    """Check that a wrong type, a number below an option's minimum and an unknown word raise InvalidOptionError."""
    wrong: list[tuple[str, Any]] = [(option, least - 1) for option, least in solver.minima.items()]
    wrong += [(option, "no such word") for option in solver.words]
    hints, nothing = annotations(type(solver)), object()
    wrong += [(option, nothing) for option in solver.option_values if not fits(nothing, hints.get(option, Any))]
    for option, value in wrong:
        try:
            registry.configured(solver, {option: value})
        except InvalidOptionError as error:
            require(solver, option in str(error), f"the error does not name the option {option!r}: {error}")
        else:
            fail(solver, f"accepted {option}={value!r}")


def check_pickle(solver: Solver) -> None:
    """Check that a pickled copy has the same options and gives the same kind of answer (for worker processes)."""
    try:
        copy = pickle.loads(pickle.dumps(solver))  # noqa: S301  (pickled on the same line)
    except Exception as error:
        raise ConformanceError(f"{solver.name}: cannot be pickled: {error!r}") from error
    require(solver, copy.option_values == solver.option_values, "a pickled copy has other options")
    judge_answer(solver, first_taken(solver), solve(first_taken(solver), copy, seed=SEED))


# --- answers -------------------------------------------------------------------------------------------------------


def check_answers_are_sound(solver: Solver) -> None:
    """Check objective, use and feasibility against `Problem.evaluate`, and that bounds and proofs are valid."""
    for problem in taken(solver, random_problems(solver.native_pairs)):
        judge_answer(solver, problem, solve(problem, solver, seed=SEED))


def check_equals_brute_force(solver: Solver) -> None:
    """Check that an exact solver proves the optimum of every small problem, or its infeasibility."""
    for problem in taken(solver, random_problems(solver.native_pairs)):
        best = optimum(problem)
        solution = solve(problem, solver, seed=SEED)
        wanted = Status.INFEASIBLE if best is None else Status.OPTIMAL
        require(solver, solution.status is wanted, f"status {solution.status}, must be {wanted}", problem)
        if best is not None:
            require(solver, close(problem, solution.objective, best), f"{solution.objective}, optimum {best}", problem)
            require(solver, solution.bound is not None, "OPTIMAL without a bound", problem)


def check_presolve_changes_no_answer(solver: Solver) -> None:
    """Check that answers are also valid with presolve, and that an exact solver still proves the optimum."""
    for problem in taken(solver, (*random_problems(solver.native_pairs), *degenerate_problems())):
        solution = run.solve(problem, solver, seed=SEED)
        judge_answer(solver, problem, solution)
        if solver.exact:
            best = optimum(problem)
            wanted = Status.INFEASIBLE if best is None else Status.OPTIMAL
            require(solver, solution.status is wanted, f"status {solution.status}, must be {wanted}", problem)
            if best is not None:
                same = close(problem, solution.objective, best) and close(problem, solution.bound, best)
                require(solver, same, f"{solution.objective}, bound {solution.bound}, optimum {best}", problem)


def check_degenerate_problems(solver: Solver) -> None:
    """Check degenerate problems: one group, one option, ties, zeros, no budget, an exactly met one, huge numbers."""
    for problem in taken(solver, degenerate_problems()):
        judge_answer(solver, problem, solve(problem, solver, seed=SEED))


def check_impossible_budget_is_refused(solver: Solver) -> None:
    """Check that a budget below the smallest use raises InfeasibleBudgetError with the resource and both numbers."""
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 7})
    try:
        solve(problem, solver)
    except InfeasibleBudgetError as error:
        missing = [word for word in ("bytes", "7", "8") if word not in str(error)]
        require(solver, not missing, f"the error lacks {missing}: {error}")
    else:
        fail(solver, "solved a problem whose budget no choice can meet", problem)


def check_budgets_that_clash(solver: Solver) -> None:
    """Check budgets that can be met alone but not together: no choice, and INFEASIBLE from exact solvers."""
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    for clashing in taken(solver, [problem]):
        solution = solve(clashing, solver, seed=SEED)
        judge_answer(solver, clashing, solution)
        if solver.exact:
            outcome = f"{solution.status}, {solution.stop_reason}"
            require(solver, solution.status is Status.INFEASIBLE, f"must prove INFEASIBLE, found {outcome}", clashing)


def check_pair_terms_in_budgets(solver: Solver) -> None:
    """Check that budgets with pair terms hold for the true uses, and that exact solvers prove their answers.

    A solver may refuse such budgets by name, unless it declares ``native_use_pairs``.
    """
    for problem in paired_problems(solver.native_pairs):
        try:
            solution = solve(problem, solver, seed=SEED)
        except UnsupportedProblemError as error:
            require(solver, not solver.native_use_pairs, f"declares native_use_pairs but refuses: {error}", problem)
            named = repr(solver.name) in str(error) and "pair terms" in str(error)
            require(solver, named, f"the error must name the solver and the pair terms: {error}", problem)
            continue
        judge_answer(solver, problem, solution)
        if solver.exact:
            wanted = Status.INFEASIBLE if optimum(problem) is None else Status.OPTIMAL
            require(solver, solution.status is wanted, f"status {solution.status}, must be {wanted}", problem)


def check_pair_terms_are_refused(solver: Solver) -> None:
    """Check that a solver with ``native_pairs = False`` refuses pair terms and never ignores them."""
    pairs = PairTerms(factor=np.array([[1.0], [2.0], [3.0], [4.0]]))
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {}, {}, pairs)
    try:
        solve(problem, solver)
    except UnsupportedProblemError as error:
        require(solver, "pair" in str(error), f"the error does not say that pair terms are the reason: {error}")
    else:
        fail(solver, "declares native_pairs = False but solved a problem with pair terms")


# --- behaviour during a run ----------------------------------------------------------------------------------------


def check_time_limit(solver: Solver) -> None:
    """Check that a run ends within the time limit plus 10 % plus one second, with a choice and without false proofs.

    On a busy machine the additional second is multiplied by the slowdown of a busy loop.
    """
    for problem in largest_taken(solver):
        # imports and compilation affect the first run, and a pause of the machine perhaps another one, but not four
        for last in (False, False, False, True):
            start = time.perf_counter()
            solution = solve(problem, solver, seed=SEED, time_limit=TIME_LIMIT_S)
            wall = time.perf_counter() - start
            require(solver, solution.choice is not None, "found no choice when its time was limited", problem)
            judge_course(solver, problem, solution)
            allowed = TIME_LIMIT_S * 1.1 + _slowdown()
            if wall <= allowed:
                break
            overrun = f"took {wall:.2f} s with time_limit={TIME_LIMIT_S} (allowed: {allowed:.2f} s)"
            require(solver, not last, overrun, problem)


def _slowdown() -> float:
    """Measure the ratio of wall time to processor time of a busy loop, at least 1."""
    start, begun = time.perf_counter(), time.process_time()
    while time.process_time() - begun < SPIN_S:
        pass
    return max(1.0, (time.perf_counter() - start) / SPIN_S)


def check_interrupt_keeps_the_best(solver: Solver) -> None:
    """Check that Ctrl-C (a KeyboardInterrupt from ``on_progress``) ends a run with the best choice at any time."""
    for after in (1, 4):
        for problem in largest_taken(solver):
            _interrupted(solver, problem, after)
        for problem in taken(solver, known_problems(solver.native_pairs)):
            judge_claims(solver, problem, _interrupted(solver, problem, after))


def _interrupted(solver: Solver, problem: Problem, after: int) -> Solution:
    """Return the solution of a run that is interrupted when ``on_progress`` gets a choice for the ``after``-th time."""
    seen: list[float] = []

    def interrupt(progress: Progress) -> None:
        if progress.objective is not None:
            seen.append(progress.objective)
            if len(seen) >= after:
                raise KeyboardInterrupt

    try:
        solution = solve(problem, solver, seed=SEED, time_limit=TIME_LIMIT_S, on_progress=interrupt)
    except KeyboardInterrupt as error:
        raise ConformanceError(f"{solver.name}: let KeyboardInterrupt through, so the best choice is lost") from error
    require(solver, bool(seen), "never told on_progress about a choice it found", problem)
    reason = solution.stop_reason
    stopped = reason is StopReason.INTERRUPTED or len(seen) < after
    require(solver, stopped, f"stop reason must be INTERRUPTED, found {reason}", problem)
    require(solver, solution.objective is not None, "lost its choice when it was interrupted", problem)
    require(solver, solution.objective <= min(seen), "returned a worse choice than it had", problem)  # type: ignore[operator]
    judge_course(solver, problem, solution)
    return solution


def check_errors_of_on_progress_surface(solver: Solver) -> None:
    """Check that an exception in the caller's ``on_progress`` reaches the caller."""

    class CallerError(Exception):
        pass

    def raise_error(_: Progress) -> None:
        raise CallerError

    try:
        solve(first_taken(solver), solver, seed=SEED, on_progress=raise_error)
    except CallerError:
        return
    fail(solver, "swallowed an exception raised by on_progress (or never called it)")


def check_same_seed_same_answer(solver: Solver) -> None:
    """Check that two runs with the same seed give the same choice, whatever the state of the global generators.

    Solvers that do not guarantee this declare ``deterministic = False``.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (the state that must not matter)
    try:
        for problem in taken(solver, [middle_problem(solver.native_pairs), *random_problems(solver.native_pairs)[:5]]):
            choices = []
            for number in (1, 2):
                random.seed(number)
                np.random.seed(number)  # noqa: NPY002
                choices.append(_listed(solve(problem, solver, seed=SEED).choice))
            require(solver, choices[0] == choices[1], f"{choices[0]} and {choices[1]} from seed {SEED}", problem)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def check_scale_changes_no_choice(solver: Solver) -> None:
    """Check that scaling costs and pair terms by 1e-12 … 1e9, or uses by other units, does not change the choice."""
    paired = paired_problems(solver.native_pairs) if solver.native_use_pairs else ()
    for problem in taken(solver, [middle_problem(solver.native_pairs), *paired]):
        reference = _listed(solve(problem, solver, seed=SEED).choice)
        changes = [(f"objective times {scale:g}", scaled(problem, scale).problem) for scale in SCALES]
        changes += [(f"uses times {unit:g}", in_other_units(problem, unit)) for unit in UNITS]
        for change, changed in changes:
            choice = _listed(solve(changed, solver, seed=SEED).choice)
            require(solver, choice == reference, f"{change} changed the choice from {reference} to {choice}", problem)


def check_initial_is_used(solver: Solver) -> None:
    """Check that the answer is never worse than a feasible ``initial``, and that an infeasible one is accepted."""
    for problem in taken(solver, [p for p in random_problems(solver.native_pairs) if optimum(p) is not None][:6]):
        choices = list(all_choices(problem))
        judged = [problem.evaluate(choice) for choice in choices]
        feasible = [number for number, evaluation in enumerate(judged) if evaluation.feasible]
        best = min(feasible, key=lambda number: judged[number].objective)
        solution = solve(problem, solver, seed=SEED, initial=choices[best])
        judge_answer(solver, problem, solution)
        require(solver, close(problem, solution.objective, judged[best].objective), "worse than initial", problem)
        if broken := [number for number, evaluation in enumerate(judged) if not evaluation.feasible]:
            judge_answer(solver, problem, solve(problem, solver, seed=SEED, initial=choices[broken[0]]))


def check_inputs_are_unchanged(solver: Solver) -> None:
    """Check that a run does not change the problem, ``initial`` or the solver's options."""
    problem = first_taken(solver)
    fingerprint, options = problem.fingerprint(), dict(solver.option_values)
    initial = np.zeros(problem.num_groups, dtype=np.int64)
    solve(problem, solver, seed=SEED, initial=initial)
    require(solver, problem.fingerprint() == fingerprint, "changed the problem", problem)
    require(solver, not initial.any(), "changed the caller's initial choice", problem)
    require(solver, dict(solver.option_values) == options, "changed its options")


ALWAYS: tuple[Check, ...] = (
    check_description,
    check_unknown_option_is_refused,
    check_option_limits,
    check_pickle,
    check_answers_are_sound,
    check_presolve_changes_no_answer,
    check_degenerate_problems,
    check_impossible_budget_is_refused,
    check_budgets_that_clash,
    check_pair_terms_in_budgets,
    check_cut_runs_claim_nothing_false,
    check_interrupt_keeps_the_best,
    check_errors_of_on_progress_surface,
    check_initial_is_used,
    check_inputs_are_unchanged,
)


def _listed(choice: NDArray[np.int64] | None) -> list[int] | None:
    return None if choice is None else choice.tolist()
