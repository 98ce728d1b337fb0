"""Find a pool of several good, different choices, to select among by criteria that the objective does not contain.

The first choice is the best. Each further one is the best among those that differ from all previous ones in at least d
groups. "At most G - d groups as in that choice" is a sum over the options, hence one more budget: every solver supports
it, and an exact solver proves each member of the pool. All members meet the problem's budgets, any two differ in at
least d groups, and none is further from the best than requested. They are sorted, best first.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError, Problem
from formulations.validation import frozen
from solvers import registry
from solvers.base import SolverLike
from solvers.compare.time_to_target import target_near
from solvers.errors import InvalidOptionError
from solvers.run import as_solver, solve
from solvers.solution import Solution, Status, StopReason
from solvers.solution_update import with_known
from solvers.validation import require_problem


def pool(
    problem: Problem,
    k: int,
    *,
    within: float = 0.01,
    distance: int = 1,
    solver: SolverLike = "auto",
    time_limit: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> Solution:
    """Find up to ``k`` good choices that differ from each other.

    Args:
        problem: the problem to solve.
        k: maximum number of choices, including the best.
        within: maximum excess over the best objective, relative to its absolute value.
        distance: minimum number of groups in which any two choices differ.
        solver: the solver, same as in `solve`; it runs once for each choice.
        time_limit: maximum time in seconds for the whole pool.
        seed: random seed; the same seed gives the same result.
        **options: options of the solver.

    Returns:
        The solution that `solve` returns, with ``pool`` set to choices and their objectives, best first (including the
        best). ``details["pool"]`` says why the search ended (``stopped``) and whether the pool is ``proven``: each
        member is proven to be the best, and no further one exists if there are fewer than ``k``. Ctrl-C ends the pool
        with the choices so far and the stop reason INTERRUPTED.

    Raises:
        InvalidOptionError: ``k``, ``within`` or ``distance`` is out of range for the problem.
        InfeasibleBudgetError: a budget lies below the smallest possible use of its resource.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 2], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> pool(problem, 3, within=0.5).pool
    (((0, 1), 2.0), ((1, 0), 3.0))
    """
    require_problem(problem, "pool")
    _require_in_range(problem, k, within, distance)
    problem.require_linear_budgets("pool")
    back_end = registry.configured(as_solver(solver), options)
    back_end.require(problem)
    back_end.prepare()  # before the clock starts, as in `solve`
    end = np.inf if time_limit is None else time.perf_counter() + time_limit

    def run(runs_left: int, part: Problem, start: NDArray[np.int64] | None) -> Solution:
        seconds = None if time_limit is None else max((end - time.perf_counter()) / runs_left, 1e-3)
        return solve(part, back_end, time_limit=seconds, seed=seed, initial=start)

    best = run(k, problem, None)
    members = [] if best.choice is None else [best.choice]
    proven, stopped = best.status in (Status.OPTIMAL, Status.INFEASIBLE), "all found" if members else "no choice found"
    stop_reason = best.stop_reason
    while 0 < len(members) < k and stop_reason is not StopReason.INTERRUPTED:
        if time.perf_counter() > end:
            proven, stopped = False, "time limit"
            break
        try:
            restricted = _away(problem, members, distance)
            further = run(k - len(members), restricted, _start(restricted, members[0]))
        except KeyboardInterrupt:  # outside the solver, which handles it by itself
            stop_reason = StopReason.INTERRUPTED
            break
        except InfeasibleBudgetError:  # groups with one option make the distance impossible
            stopped = "no other choice differs enough"
            break
        limit = target_near(min(_objectives(problem, members)), within)
        stop_reason = further.stop_reason if further.stop_reason is StopReason.INTERRUPTED else stop_reason
        if further.status is Status.INFEASIBLE:
            stopped = "no other choice differs enough"
            break
        if further.objective is None or further.objective > limit:
            beyond = further.bound is not None and further.bound > limit
            proven, stopped = proven and beyond, "no other choice is near enough"
            break
        assert further.choice is not None  # noqa: S101 - it has an objective
        members.append(further.choice)
        proven = proven and further.status is Status.OPTIMAL
    if stop_reason is StopReason.INTERRUPTED:
        proven, stopped = False, "interrupted"
    best = with_known(problem, best, choices=members)
    about = {"within": within, "distance": distance, "stopped": stopped, "proven": proven}
    near, details = _near(problem, members, within), {**best.details, "pool": about}
    return replace(best, stop_reason=stop_reason, pool=near, details=details)


def _require_in_range(problem: Problem, k: int, within: float, distance: int) -> None:
    if k < 1 or not (np.isfinite(within) and within >= 0) or not 1 <= distance <= problem.num_groups:
        raise InvalidOptionError(
            f"a pool takes k ≥ 1, within ≥ 0 and a distance of 1 to {problem.num_groups} groups; "
            f"found k={k}, within={within}, distance={distance}"
        )


def _near(
    problem: Problem, members: Sequence[NDArray[np.int64]], within: float
) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Choices with their objectives, best first, as far as they are near the best."""
    ranked = sorted(zip(_objectives(problem, members), (tuple(m.tolist()) for m in members), strict=True))
    return tuple((choice, value) for value, choice in ranked if value <= target_near(ranked[0][0], within))


def _objectives(problem: Problem, members: Sequence[NDArray[np.int64]]) -> list[float]:
    return [problem.evaluate(member).objective for member in members]


def _away(problem: Problem, members: Sequence[NDArray[np.int64]], distance: int) -> Problem:
    """Add one budget for each member to the problem: at most G - d groups as in that member."""
    resources, budgets = dict(problem.resources), dict(problem.budgets)
    for number, member in enumerate(members):
        name = f"groups as in choice {number}"
        while name in resources:
            name += "'"
        alike = np.zeros(problem.num_options)
        alike[problem.flat(member)] = 1.0
        resources[name], budgets[name] = frozen(alike), float(problem.num_groups - distance)
    return problem.derived(resources=MappingProxyType(resources), budgets=MappingProxyType(budgets))


def _start(restricted: Problem, best: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Repair the best choice so that it differs enough from all members."""
    from solvers.kernels.repair import repair  # compiled code, imported only when used

    return repair(restricted, best)
