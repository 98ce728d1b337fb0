"""A search inside another: what it finds arrives outside, lifted; time, proof and details are shared as they must."""

import numpy as np
import pytest

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from formulations.reductions.base import IdentityReduction
from formulations.reductions.components import split
from formulations.reductions.restriction import restrict
from formulations.reductions.scaling import scaled
from formulations.reductions.tie import tie
from solvers.search import Search
from solvers.solution import Status, StopReason
from solvers.sub_search import SubSearch


def two_layers() -> Problem:
    return Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})


def test_choices_and_bounds_arrive_in_the_outer_searchs_unit():
    outer = Search(two_layers(), solver="test")
    inner = SubSearch(scaled(outer.problem, 10.0), outer)
    assert inner.offer([0, 1])
    inner.raise_bound(5.0)
    assert (inner.objective, inner.bound) == (10.0, 5.0)
    assert (outer.objective, outer.bound) == (1.0, 0.5)
    inner.close()
    assert outer.solution(StopReason.COMPLETED, {}).status is Status.OPTIMAL


def test_an_objective_of_zero_is_no_tight_bound():
    search = Search(Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {}), solver="test")
    assert search.gap == np.inf
    search.offer([0])
    search.raise_bound(-5.0)
    assert (search.objective, search.gap) == (0.0, np.inf)
    search.raise_bound(0.0)
    assert search.gap == 0.0


def test_noted_numbers_are_in_the_stated_problems_unit():
    outer = Search(two_layers(), solver="test")
    inner = SubSearch(scaled(outer.problem, 10.0), outer)
    deeper = SubSearch(scaled(inner.problem, 2.0), inner)
    deeper.note(energy=20.0, none=None, prices={"bytes": 40.0}, spectrum=np.array([60.0]))
    assert outer.details == {"energy": 1.0, "none": None, "prices": {"bytes": 2.0}, "spectrum": [3.0]}
    assert deeper.stated is outer
    assert deeper.original is outer.problem


def test_a_part_proves_nothing_about_the_whole():
    outer = Search(two_layers(), solver="test")
    tied = tie(outer.problem, [("a", "b")])
    inner = SubSearch(tied, outer)
    inner.offer([1])
    inner.close()
    assert inner.proven()
    assert outer.choice.tolist() == [1, 1]
    assert outer.bound is None
    assert not outer.closed


def test_a_part_outside_of_which_nothing_is_better_proves_the_whole():
    outer = Search(two_layers(), solver="test")
    outer.offer([1, 1])
    part = restrict(outer.problem, np.array([True, False, True, True]), outside=4.0)
    inner = SubSearch(part, outer)
    inner.offer([1])
    inner.close()
    assert outer.choice.tolist() == [0, 1]
    assert outer.solution(StopReason.COMPLETED, {}).status is Status.OPTIMAL


def test_bounds_of_components_add_up_and_share_the_tolerance():
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [1, 2, 5, 2], {}, {}, offset=10.0)
    outer = Search(problem, solver="test")
    outer.offer([0, 1])
    first, second = split(problem)
    inner = SubSearch(first.beside([0, 1], 12.0), outer, shares=4)
    inner.offer([0])
    inner.raise_bound(1.0)
    assert outer.bound == 13.0
    assert inner.tolerance() == outer.tolerance() / 4
    assert second.beside([0, 0], -np.inf).lift_bound(2.0) == -np.inf


def test_a_run_of_its_own_shares_neither_details_nor_random_numbers():
    outer = Search(layered_problem(4), solver="test", seed=0)
    same = IdentityReduction(original=outer.problem)
    apart, shared = SubSearch(same, outer, apart=True, seed=7, solver="inner"), SubSearch(same, outer)
    apart.details["mine"] = 1
    apart.offer(np.full(4, 0))
    assert outer.details == {}
    assert (apart.seed, apart.solver, shared.seed, shared.solver) == (7, "inner", 0, "test")
    assert shared.rng is outer.rng
    assert apart.rng is not outer.rng
    assert apart.summary()["objective"] == outer.objective


def test_an_inner_search_ends_with_the_outer_one_and_not_the_other_way_round():
    outer = Search(two_layers(), solver="test")
    inner = SubSearch(IdentityReduction(original=outer.problem), outer, seconds=0.0)
    assert inner.expired()
    assert inner.cut
    assert not outer.expired()
    ended = Search(outer.problem, solver="test", time_limit=1e-9)
    assert SubSearch(IdentityReduction(original=outer.problem), ended).expired()


def test_what_is_learned_stays_with_its_search():
    outer = Search(two_layers(), solver="test")
    inner = SubSearch(IdentityReduction(original=outer.problem), outer)
    inner.learn("a lesson")
    assert inner.learned(str) == "a lesson"
    assert outer.learned(str) is None


@pytest.mark.parametrize("bound", [np.nan, np.inf, -np.inf])
def test_a_bound_that_is_no_number_is_dropped(bound):
    outer = Search(two_layers(), solver="test")
    assert not SubSearch(IdentityReduction(original=outer.problem), outer).raise_bound(bound)
    assert outer.bound is None
