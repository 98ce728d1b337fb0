"""Every reduction keeps its promises, alone and in a chain: the way there and back, the objective, budgets, bounds."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import Problem
from formulations.generators.random_instances import small_problem
from formulations.reductions.base import Chain, Identity, Reduction
from formulations.reductions.components import Component, split
from formulations.reductions.presolve import reduce_problem
from formulations.reductions.restriction import Restriction, restrict
from formulations.reductions.scaling import Scaling, normal_form, scaled
from formulations.reductions.tie import Tied, tie

TOLERANCE = 1e-9
"""Relative to the size of the costs: sums in another order differ by 1e-14, a wrong term by far more."""


def choices(problem: Problem) -> list[tuple[int, ...]]:
    """All choices of a problem."""
    return list(itertools.product(*(range(len(options)) for options in problem.options)))


def best_objective(problem: Problem) -> float:
    """The least objective within the budgets, by looking at all choices; infinite when there is none."""
    judged = map(problem.evaluate, choices(problem))
    return min((one.objective for one in judged if one.feasible), default=np.inf)


def same(problem: Problem, rng: np.random.Generator) -> Reduction:
    return Identity(original=problem)


def scaling(problem: Problem, rng: np.random.Generator) -> Reduction:
    return scaled(problem, float(10.0 ** rng.integers(-3, 4)))


def normalising(problem: Problem, rng: np.random.Generator) -> Reduction:
    form = normal_form(problem)
    assert not form.problem.fixed
    return form


def restriction(problem: Problem, rng: np.random.Generator) -> Reduction:
    """Random options, at least one a group, and the truth about the others."""
    keep = rng.random(problem.num_options) < 0.6
    keep[problem.group_offsets[:-1] + rng.integers(0, np.diff(problem.group_offsets))] = True
    judged = {choice: problem.evaluate(choice) for choice in choices(problem) if not keep[problem.flat(choice)].all()}
    outside = min((one.objective for one in judged.values() if one.feasible), default=np.inf)
    return restrict(problem, keep, outside=outside)


def tying(problem: Problem, rng: np.random.Generator) -> Reduction:
    """All groups of one size tied."""
    sizes = {len(options) for options in problem.options}
    sets = [[g for g, o in zip(problem.groups, problem.options, strict=True) if len(o) == size] for size in sizes]
    return tie(problem, [names for names in sets if len(names) > 1])


def presolving(problem: Problem, rng: np.random.Generator) -> Reduction:
    return reduce_problem(problem)


def component(problem: Problem, rng: np.random.Generator) -> Reduction:
    """The first component, beside a choice of the others that is as good as any."""
    parts = split(problem)
    bests = [min(choices(part.problem), key=lambda c, p=part.problem: rank(p, c)) for part in parts]
    rest = np.zeros(problem.num_groups, dtype=np.int64)
    for part, best in zip(parts, bests, strict=True):
        rest[part.groups] = best
    bound = problem.offset + sum(best_objective(part.problem) for part in parts[1:])
    return parts[0].beside(rest, bound)


def rank(problem: Problem, choice: tuple[int, ...]) -> tuple[bool, float]:
    judged = problem.evaluate(choice)
    return not judged.feasible, judged.objective


Make = Callable[[Problem, np.random.Generator], Reduction]
MAKERS: tuple[Make, ...] = (same, scaling, normalising, restriction, tying, presolving, component)


def decides_alone(reduction: Reduction) -> bool:
    """Whether no step leaves the choice of some groups to others."""
    if isinstance(reduction, Chain):
        return decides_alone(reduction.first) and decides_alone(reduction.second)
    return not isinstance(reduction, Component)


def assert_promises_hold(reduction: Reduction) -> None:
    """What `formulations.reductions.base` says always holds, over all choices of both problems."""
    original, problem = reduction.original, reduction.problem
    tolerance = TOLERANCE * (1.0 + float(np.abs(original.cost).sum()))
    best, small_best = best_objective(original), best_objective(problem)
    constants = []
    for choice in choices(problem):
        lifted = reduction.lift(choice)
        assert np.array_equal(reduction.lower(lifted), choice)
        small, whole = problem.evaluate(choice), original.evaluate(lifted)
        constants.append(whole.objective - reduction.unit * small.objective)
        if small.feasible and (decides_alone(reduction) or np.isfinite(best)):
            assert whole.feasible
        if isinstance(reduction, Restriction | Tied | Scaling | Identity) and not (
            reduction.original.fixed and not problem.fixed
        ):
            assert {name: whole.usage[name] for name in small.usage} == pytest.approx(small.usage)
    assert max(constants) - min(constants) <= tolerance
    assert not reduction.lift_bound(small_best) > best + tolerance
    if reduction.complete:
        assert not np.isfinite(best) or reduction.lift_bound(small_best) == pytest.approx(best, abs=tolerance)
    for choice in choices(original) if decides_alone(reduction) else []:
        judged, lowered = original.evaluate(choice), reduction.lower(choice)
        if judged.feasible and lowered is not None:
            again = original.evaluate(reduction.lift(lowered))
            assert again.feasible
            assert again.objective <= judged.objective + tolerance


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_reduction_keeps_its_promises(make: Make, seed: int) -> None:
    assert_promises_hold(make(small_problem(seed, max_groups=4, max_options=3), np.random.default_rng(seed)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), makers=st.lists(st.sampled_from(MAKERS), min_size=2, max_size=3))
def test_a_chain_keeps_the_promises_of_its_steps(seed: int, makers: list[Make]) -> None:
    problem, rng = small_problem(seed, max_groups=4, max_options=3), np.random.default_rng(seed)
    chain = makers[0](problem, rng)
    for make in makers[1:]:
        chain = chain.then(make(chain.problem, rng))
    assert_promises_hold(chain)
    assert chain.original is problem


def test_a_restriction_proves_nothing_of_what_it_leaves_out():
    problem = small_problem(3)
    keep = np.zeros(problem.num_options, dtype=bool)
    keep[problem.group_offsets[:-1]] = True
    part = restrict(problem, keep)
    assert part.lift_bound(1.0) == -np.inf
    assert not part.complete


def test_a_bound_of_a_component_holds_with_the_others_bounds_only():
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 5, 2], {}, {}, offset=10.0)
    first, second = split(problem)
    assert first.lift_bound(0.0) == -np.inf
    assert first.beside([0, 1], 12.0).lift_bound(0.0) == 12.0
    assert first.beside([0, 1], 12.0).lift([1]).tolist() == [1, 1]
    assert second.beside([1, 0], 10.0).lift([1]).tolist() == [1, 1]
