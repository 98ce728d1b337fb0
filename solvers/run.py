"""`solve`, the single entry point to all back ends."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.interrupts import is_interrupt
from formulations.reductions.presolve import reduce_problem
from formulations.reductions.scaling import normal_form, scaled
from solvers import registry
from solvers.base import OnProgress, Search, Solver, SolverLike, SubSearch
from solvers.errors import InvalidOptionError
from solvers.presolved import cheap, solve_parts
from solvers.solution import Solution, StopReason
from solvers.stated_search import StatedSearch
from solvers.uneven import search_evenly
from solvers.validation import as_seed, require_problem

if TYPE_CHECKING:
    from solvers.leap.job import Job

PRESOLVE_SHARE = 0.2
"""Maximum fraction of the remaining time for presolve."""


@overload
def solve(
    problem: Problem, solver: SolverLike = ..., *, wait: Literal[False], time_limit: float | None = ..., **options: Any
) -> "Job": ...


@overload
def solve(
    problem: Problem,
    solver: SolverLike = ...,
    *,
    time_limit: float | None = ...,
    seed: int | None = ...,
    initial: ArrayLike | None = ...,
    on_progress: OnProgress | None = ...,
    bound: bool = ...,
    presolve: bool = ...,
    wait: Literal[True] = ...,
    **options: Any,
) -> Solution: ...


def solve(
    problem: Problem,
    solver: SolverLike = "auto",
    *,
    time_limit: float | None = None,
    seed: int | None = None,
    initial: ArrayLike | None = None,
    on_progress: OnProgress | None = None,
    bound: bool = False,
    presolve: bool = True,
    wait: bool = True,
    **options: Any,
) -> "Solution | Job":
    """Choose one option per group to minimise the objective within the budgets.

    Args:
        problem: the problem to solve.
        solver: a name (see `available`), optionally with options or an import path (see `solvers.solver_text`), a
            `Solver` class or instance, or any ``dimod.Sampler`` instance.
        time_limit: maximum time in seconds, after which the best choice so far is returned; None lets the solver
            finish. The very first run may compile for some seconds before the time starts.
        seed: random seed; the same seed gives the same result, unless the time limit ends the run.
        initial: ``(G,)`` a choice to start from; an infeasible one is only a hint.
        on_progress: function called with a `Progress` whenever the incumbent or the bound changes.
        bound: whether to prove a lower bound first (in at most a fifth of the time), so that every solver's answer
            has a gap.
        presolve: whether to reduce the problem first (`formulations.reductions.presolve`); the solution always refers
            to the original problem.
        wait: False sends the problem to a service (the leap solvers) and returns a `solvers.leap.job.Job` immediately;
            ``job.fetch()`` waits for the solution, which works in another process and on another day too.
        **options: options of the solver (``available()`` lists them); unknown ones are refused.

    Returns:
        A `Solution` with objective and feasibility computed by ``Problem.evaluate``. Ctrl-C ends the run with the best
        choice so far.

    Raises:
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.
        UnknownSolverError, InvalidOptionError, UnsupportedProblemError, SolverUnavailableError: see `solvers.errors`.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "brute-force")
    >>> solution.choice.tolist(), solution.objective, str(solution.status)
    ([0, 1], 1.0, 'OPTIMAL')
    """
    start = _checked_start(problem, time_limit, initial)
    for name, flag in (("bound", bound), ("presolve", presolve), ("wait", wait)):
        if not isinstance(flag, bool):
            raise InvalidOptionError(f"{name} must be True or False, found {flag!r}")
    if on_progress is not None and not callable(on_progress):
        raise InvalidOptionError(f"on_progress must be a function to call, found {on_progress!r}")
    seed = None if seed is None else as_seed(seed)
    back_end = registry.configured(as_solver(solver), options)
    problem.require_reachable_budgets()
    back_end.require(problem)
    if not wait:
        if start is not None or on_progress is not None or bound:
            raise InvalidOptionError("wait=False only sends the problem: it takes no initial, on_progress or bound")
        job: Job = back_end.submit(problem, time_limit=time_limit)
        return job
    prepare(back_end, problem)
    search = StatedSearch(
        problem,
        solver=back_end.name,
        time_limit=time_limit,
        seed=seed,
        initial=start,
        on_progress=on_progress,
    )
    return conduct(search, back_end, bound=bound, presolve=presolve)


def prepare(back_end: Solver, problem: Problem) -> None:
    """Compile what the back end needs for a problem, before the time of its run starts."""
    back_end.prepare()
    if problem.paired_budgets and not back_end.takes_use_pairs(problem):
        from solvers import paired_budgets  # compiled code, imported only when used

        paired_budgets.prepare()


def conduct(search: Search, back_end: Solver, *, bound: bool = False, presolve: bool = True) -> Solution:
    """Run a prepared back end on the problem of a new search; Ctrl-C ends the run with the best choice so far."""
    stop_reason = StopReason.COMPLETED
    try:
        if search.initial is not None:
            search.offer(search.initial)
        attack = partial(_run_reduced, back_end=back_end, bound=bound, presolve=presolve)
        search_evenly(search, attack, reducible=back_end.presolved)
    except (KeyboardInterrupt, SystemError) as error:
        if not is_interrupt(error):
            raise
        stop_reason = StopReason.INTERRUPTED
    return search.solution(stop_reason, back_end.option_values)


def _checked_start(problem: Problem, time_limit: float | None, initial: ArrayLike | None) -> NDArray[np.int64] | None:
    """Check the problem, the time limit and the initial choice, and return the latter."""
    require_problem(problem, "solve")
    if time_limit is not None and (isinstance(time_limit, bool) or not (np.isfinite(time_limit) and time_limit > 0)):
        raise InvalidOptionError(f"time_limit must be a positive number of seconds, found {time_limit!r}")
    if initial is None:
        return None
    start = problem.flat(initial) - problem.group_offsets[:-1]
    if start.ndim != 1:
        raise InvalidOptionError(f"initial must be one choice of shape ({problem.num_groups},), found {start.shape}")
    return start


def _run_reduced(search: Search, *, back_end: Solver, bound: bool, presolve: bool) -> None:
    """Run the back end on the reduced problem of the search."""
    problem = search.problem

    def run(outer: Search) -> None:
        _run_scaled(outer, back_end, bound=bound)

    if problem.paired_budgets and not back_end.takes_use_pairs(problem):
        from solvers.paired_budgets import solve_paired  # compiled code, imported only when used

        prover = back_end.prover()
        prove = None if prover is None else partial(_run_scaled, back_end=prover, bound=False)
        attack = partial(_run_scaled, back_end=back_end.at_prices(), bound=bound)
        inner = SubSearch(scaled(problem), search, initial=search.initial)
        if search.choice is not None:
            inner.begin_from(search.choice)
        exact, anneal = back_end.exact, back_end.anneals_use_pairs
        solve_paired(inner.problem, inner, attack, exact=exact, anneal=anneal, prove=prove)
        if inner.cut:
            search.cut_short()
        return
    if presolve and back_end.presolved and not problem.paired_budgets:
        with search.phase("presolve_s"), search.at_most(PRESOLVE_SHARE * search.remaining()):
            reduction = reduce_problem(problem, search.expired)
        no_time_left = search.expired() and search.choice is None and reduction.feasible
        if no_time_left and (quick := cheap(problem)) is not None:
            search.offer(quick)
        if reduction.changed:
            solve_parts(reduction, search, run)
            return
    run(search)


def _run_scaled(outer: Search, back_end: Solver, *, bound: bool) -> None:
    """Run the back end on the problem scaled to about 1, after proving a bound if requested."""
    search = SubSearch(normal_form(outer.problem), outer, initial=outer.initial)
    if outer.choice is not None:
        search.begin_from(outer.choice)
    if bound and not search.problem.paired_budgets:
        from solvers.bounds.duality import raise_dual_bound  # compiled code, imported only when used

        raise_dual_bound(search.problem, search, 0.2)
    if not search.proven():
        back_end.run(search.problem, search)
    if search.cut:
        outer.cut_short()


def judge(problem: Problem, choice: ArrayLike, *, name: str = "given") -> Solution:
    """Evaluate a choice made by other means (uniform bits, by hand); an infeasible choice is not in the `Solution`.

    Args:
        problem: the problem that the choice is for.
        choice: ``(G,)`` local option index of every group.
        name: name of the solver in the solution.

    >>> judge(Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {}), [1]).objective
    3.0
    """
    search = StatedSearch(problem, solver=name)
    search.offer(choice)
    return search.solution(StopReason.COMPLETED, {})


def as_solver(solver: SolverLike) -> Solver:
    """Return the `Solver` for a text (see `solvers.solver_text`), a class, an instance or a dimod sampler.

    Raises:
        UnknownSolverError: the name is unknown.
        InvalidOptionError: ``solver`` is neither a solver nor a dimod sampler, or it has no such option.
    """
    if isinstance(solver, str) and ":" in solver:
        from solvers import solver_text  # needed only for texts that are not plain names

        meant, options = solver_text.resolved(solver)
        made = solver_text.configured(as_solver(meant), options)
        return made if isinstance(meant, str) else registry.made_in(solver.partition(":")[0], made)
    if isinstance(solver, str):
        return registry.solver_class(solver)()
    if isinstance(solver, type) and issubclass(solver, Solver):
        return solver()
    if isinstance(solver, Solver):
        return solver
    from solvers.qubo.dimod_sampler import from_sampler  # imports dimod, so only for other objects than solvers

    return from_sampler(solver)
