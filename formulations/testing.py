"""Test a reduction or a formulation that you wrote.

    from formulations.testing import check_formulation, check_reduction
    check_reduction(make)                  # make(problem, rng) returns the reduction of a problem
    check_formulation(problem, objective)  # objective(choice) is computed directly, from the tables

Both enumerate every choice of small problems. Only the problems of `check_reduction` are random; they are drawn from
fixed seeds.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from formulations.errors import FormulationError, InvalidProblemError
from formulations.generators.random_instances import small_problem
from formulations.problem import Problem
from formulations.reductions.base import Reduction
from formulations.reductions.scaling import scaled

MAX_CHOICES = 100_000
"""Maximum number of choices of a problem that `check_formulation` enumerates."""

TOLERANCE = 1e-9
"""Tolerance relative to the size of the costs. Reordered sums differ by 1e-14, a wrong term by far more."""

MakeReduction = Callable[[Problem, np.random.Generator], Reduction]
"""Function that returns the reduction of a problem; all randomness is drawn from the generator."""


class FormulationCheckError(FormulationError, AssertionError):
    """A reduction or a formulation violates its contract."""


def check_reduction(make: MakeReduction, *, num_problems: int = 60) -> None:
    """Check a reduction alone and after a change of unit, on small random problems.

    Every problem that can have them is also tried with pair terms in its budgets. ``make`` may refuse those by an
    InvalidProblemError that says so (call `Problem.require_linear_budgets`), but must not ignore them.

    Args:
        make: function that returns the reduction of a problem.
        num_problems: number of problems; they are the same in every call.

    Raises:
        FormulationCheckError: a guarantee of `formulations.reductions.base` is violated; the message names it and the
            problem.

    >>> check_reduction(lambda problem, rng: scaled(problem, 10.0), num_problems=5)
    """
    for seed in range(num_problems):
        for paired in (False, True):
            problem = small_problem(seed, max_groups=4, max_options=3, resource_pairs=paired)
            if paired and not takes_paired_budgets(make, problem, seed):
                continue
            check_promises(make(problem, np.random.default_rng(seed)))
            scaling = scaled(problem, 8.0)
            check_promises(scaling.then(make(scaling.problem, np.random.default_rng(seed))))


def takes_paired_budgets(make: MakeReduction, problem: Problem, seed: int) -> bool:
    """Whether a problem has pair terms in its budgets that the reduction does not refuse by name."""
    if not problem.paired_budgets:
        return False
    try:
        make(problem, np.random.default_rng(seed))
    except InvalidProblemError as error:
        if "pair terms in a budget" in str(error):
            return False
        raise
    return True


def check_promises(reduction: Reduction, *, alone: bool = True) -> None:
    """Check the guarantees of `formulations.reductions.base` over all choices of both problems.

    Args:
        reduction: the reduction of a small problem.
        alone: whether a choice of the reduced problem determines all groups of the original.

    Raises:
        FormulationCheckError: a guarantee is violated; the message names it and the problem.
    """
    original, problem = reduction.original, reduction.problem
    tolerance = _tolerance(original)
    best, best_reduced = _best_objective(original), _best_objective(problem)
    constants = []
    for choice in all_choices(problem):
        lifted = reduction.lift(choice)
        lowered = reduction.lower(lifted)
        _require(lowered is not None and np.array_equal(lowered, choice), reduction,
                 f"lower(lift({choice})) must return that choice, found {lowered}")  # fmt: skip
        before, after = problem.evaluate(choice), original.evaluate(lifted)
        constants.append(after.objective - reduction.unit * before.objective)
        if before.feasible and (alone or np.isfinite(best)):
            _require(after.feasible, reduction, f"{choice} meets the budgets, lifted it violates {after.violations}")
    spread = max(constants) - min(constants)
    _require(spread <= tolerance, reduction,
             f"objectives must differ by a factor and one constant, found constants {spread:g} apart")  # fmt: skip
    bound = reduction.lift_bound(best_reduced)
    _require(not bound > best + tolerance, reduction, f"lift_bound gave {bound}, above the optimum {best}")
    if reduction.complete and np.isfinite(best):
        _require(abs(bound - best) <= tolerance, reduction,
                 f"a complete reduction lifts the optimum to the optimum {best}, found {bound}")  # fmt: skip
    for choice in all_choices(original) if alone else ():
        judged, lowered = original.evaluate(choice), reduction.lower(choice)
        if judged.feasible and lowered is not None:
            again = original.evaluate(reduction.lift(lowered))
            _require(again.feasible and again.objective <= judged.objective + tolerance, reduction,
                     f"lift(lower({choice})) must be as good as the choice")  # fmt: skip


def check_formulation(
    problem: Problem,
    objective: Callable[[Sequence[int]], float],
    usage: Callable[[Sequence[int]], Mapping[str, float]] | None = None,
) -> None:
    """Compare a formulation's problem with a direct computation, for every choice.

    Args:
        problem: the problem that the formulation built, with at most `MAX_CHOICES` choices.
        objective: function that computes the objective of a choice (one local option index per group) from the tables.
        usage: function that computes the use of each resource by a choice from the tables; None skips this check.

    Raises:
        FormulationCheckError: a choice differs; the message names the first one and the difference.

    >>> problem = Problem(["a", "b"], [["keep", "drop"]] * 2, [0, 3, 0, 1], {"bytes": [8, 0, 8, 0]}, {"bytes": 8})
    >>> check_formulation(problem, lambda choice: 3 * choice[0] + choice[1])
    """
    if (count := int(np.prod([len(options) for options in problem.options], dtype=float))) > MAX_CHOICES:
        raise FormulationCheckError(
            f"the problem has {count:,} choices, at most {MAX_CHOICES:,} can be tried; use smaller tables"
        )
    for choice in all_choices(problem):
        judged = problem.evaluate(choice)
        expected = objective(choice)
        if not abs(judged.objective - expected) <= _tolerance(problem):
            raise FormulationCheckError(
                f"choice {choice}: the problem's objective is {judged.objective}, expected {expected}"
            )
        for name, use in (usage(choice) if usage is not None else {}).items():
            if not np.isclose(judged.usage[name], use, rtol=TOLERANCE, atol=0.0):
                raise FormulationCheckError(
                    f"choice {choice}: it uses {judged.usage[name]} of {name!r}, expected {use}"
                )


def all_choices(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Iterate over every choice of a small problem."""
    return itertools.product(*(range(len(options)) for options in problem.options))


def _best_objective(problem: Problem) -> float:
    judged = map(problem.evaluate, all_choices(problem))
    return min((evaluation.objective for evaluation in judged if evaluation.feasible), default=np.inf)


def _tolerance(problem: Problem) -> float:
    factor = problem.pairs.factor
    squares = 0.0 if factor is None else float(np.square(factor).sum())
    return TOLERANCE * (1.0 + float(np.abs(problem.cost).sum()) + squares + abs(problem.offset))


def _require(holds: Any, reduction: Reduction, message: str) -> None:
    if not holds:
        raise FormulationCheckError(f"{type(reduction).__name__}: {message} [of {reduction.original!r}]")
