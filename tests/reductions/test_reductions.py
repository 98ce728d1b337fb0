"""Every reduction keeps its promises, alone and in a chain: the way there and back, the objective, budgets, bounds."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from formulations import InvalidProblemError, PairTerms, Problem
from formulations.generators.random_instances import small_problem
from formulations.reductions.base import Chain, Choice, IdentityReduction, Reduction
from formulations.reductions.components import Component, split
from formulations.reductions.order import in_order
from formulations.reductions.presolve import reduce_problem
from formulations.reductions.restriction import Restriction, restrict
from formulations.reductions.scaling import Scaling, normal_form, scaled
from formulations.reductions.tie import Tied, tie
from formulations.testing import FormulationCheckError, check_promises, check_reduction, takes_paired_budgets


def choices(problem: Problem) -> list[tuple[int, ...]]:
    """All choices of a problem."""
    return list(itertools.product(*(range(len(options)) for options in problem.options)))


def best_objective(problem: Problem) -> float:
    """The least objective within the budgets, by looking at all choices; infinite when there is none."""
    judged = map(problem.evaluate, choices(problem))
    return min((one.objective for one in judged if one.feasible), default=np.inf)


def same(problem: Problem, rng: np.random.Generator) -> Reduction:
    return IdentityReduction(original=problem)


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reordered(Reduction):
    """The groups in another order."""

    original: Problem
    problem: Problem
    order: NDArray[np.int64]

    def lift(self, choice: ArrayLike) -> Choice:
        return np.asarray(choice)[np.argsort(self.order)]

    def lower(self, choice: ArrayLike) -> Choice:
        return np.asarray(choice)[self.order]

    def lift_bound(self, bound: float) -> float:
        return bound


def reordering(problem: Problem, rng: np.random.Generator) -> Reduction:
    order = rng.permutation(problem.num_groups)
    return Reordered(original=problem, problem=in_order(problem, order), order=order)


def rank(problem: Problem, choice: tuple[int, ...]) -> tuple[bool, float]:
    judged = problem.evaluate(choice)
    return not judged.feasible, judged.objective


Make = Callable[[Problem, np.random.Generator], Reduction]
MAKERS: tuple[Make, ...] = (same, scaling, normalising, restriction, tying, presolving, component, reordering)


def decides_alone(reduction: Reduction) -> bool:
    """Whether no step leaves the choice of some groups to others."""
    if isinstance(reduction, Chain):
        return decides_alone(reduction.first) and decides_alone(reduction.second)
    return not isinstance(reduction, Component)


def assert_promises_hold(reduction: Reduction) -> None:
    """What `formulations.reductions.base` says always holds, and the same uses where only numbers differ."""
    check_promises(reduction, alone=decides_alone(reduction))
    original, problem = reduction.original, reduction.problem
    if isinstance(reduction, Restriction | Tied | Scaling | IdentityReduction) and not (
        original.fixed and not problem.fixed
    ):
        for choice in choices(problem):
            usage, lifted = problem.evaluate(choice).usage, original.evaluate(reduction.lift(choice)).usage
            assert {name: lifted[name] for name in usage} == pytest.approx(usage)


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), paired=st.booleans())
def test_a_reduction_keeps_its_promises(make: Make, seed: int, paired: bool) -> None:
    problem = small_problem(seed, max_groups=4, max_options=3, resource_pairs=paired)
    if not problem.paired_budgets or takes_paired_budgets(make, problem, seed):
        assert_promises_hold(make(problem, np.random.default_rng(seed)))


def test_who_takes_pair_terms_in_budgets_and_who_refuses_them() -> None:
    drawn = (small_problem(seed, max_groups=4, max_options=3, resource_pairs=True) for seed in itertools.count())
    problem = next(problem for problem in drawn if problem.paired_budgets)
    assert {make for make in MAKERS if not takes_paired_budgets(make, problem, 0)} == {presolving, component}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_another_order_and_back_keeps_every_field(seed: int) -> None:
    problem = small_problem(seed, resource_pairs=True)
    order = np.random.default_rng(seed).permutation(problem.num_groups)
    again = in_order(in_order(problem, order), np.argsort(order))
    assert again.fingerprint() == problem.fingerprint()


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2]])
def test_an_order_that_is_none_is_refused(order: list[int]) -> None:
    problem = Problem(["a", "b"], [["x"]] * 2, [0, 1], {}, {})
    with pytest.raises(InvalidProblemError, match="names each of 2 groups once"):
        in_order(problem, order)


def test_a_reduction_that_forgets_pair_terms_of_a_budget_is_found() -> None:
    class Forgetful(IdentityReduction):
        __slots__ = ()

        @property
        def problem(self) -> Problem:
            return self.original.derived(resource_pairs={})

    with pytest.raises(FormulationCheckError, match="meets the budgets, lifted it violates"):
        check_reduction(lambda problem, rng: Forgetful(original=problem))


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


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"lower": lambda self, choice: np.zeros(len(self.choice), dtype=np.int64)}, "must return that choice"),
        ({"lift": lambda self, choice: np.asarray(choice)[::-1]}, "must"),
        ({"unit": property(lambda self: 2.0)}, "one constant"),
        ({"lift_bound": lambda self, bound: bound + 1.0}, "above the optimum"),
        ({"lift_bound": lambda self, bound: -np.inf}, "lifts the optimum to the optimum"),
    ],
)
def test_a_reduction_that_breaks_a_promise_is_found(broken: dict[str, object], message: str) -> None:
    class Broken(IdentityReduction):
        __slots__ = ()
        choice = (0, 0)

    for name, value in broken.items():
        setattr(Broken, name, value)
    with pytest.raises(FormulationCheckError, match=message):
        check_reduction(lambda problem, rng: Broken(original=problem))


@pytest.mark.parametrize("make", [restriction, tying, lambda problem, _: tie(problem, [["g1", "g2", "g3"]])])
@given(seed=st.integers(0, 10**6))
def test_a_long_row_of_the_factor_hides_no_pair_terms(make: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(9, 3))
    rows[:, 0], rows[0] = 0.0, [1e9, 0.0, 0.0]  # the only option of its group, in a column of its own
    names = [["x"], *([["x", "y"]] * 4)]
    long = Problem([f"g{i}" for i in range(5)], names, rng.normal(size=9), {}, {}, PairTerms(factor=rows))
    short = long.derived(pairs=PairTerms(factor=rows[:, 1:]))
    one, other = (make(problem, np.random.default_rng(seed)) for problem in (long, short))
    for choice in choices(one.problem):
        value = short.evaluate(one.lift(choice)).objective
        assert one.problem.evaluate(choice).objective == pytest.approx(value, abs=1e-12)
        assert other.problem.evaluate(choice).objective == pytest.approx(value, abs=1e-12)
