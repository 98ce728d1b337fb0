"""The doubly nonnegative bound never lies above what it bounds, and the convexified problem is the same problem."""

import itertools

import numpy as np
import pytest

from formulations import PairTerms, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import Status, solve
from solvers.bounds import semidefinite
from solvers.bounds.duality import dual_bound
from solvers.bounds.semidefinite import convexified, semidefinite_bound
from tests.quick import slow_but

TOLERANCE = 1e-9  # of sums of some hundred numbers near 1


def feasible_choices(problem):
    """Every choice within the budgets with its objective."""
    sizes = (range(len(group)) for group in problem.options)
    judged = ((choice, problem.evaluate(choice)) for choice in itertools.product(*sizes))
    return [(np.array(choice), found.objective) for choice, found in judged if found.feasible]


def network(groups, options, seed=0, rank=None):
    """Full-rank pair terms whose costs are all diagonal: nothing is left of a relaxation that mixes options."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(groups, options, rank or groups * options)) * 2.0 ** -np.arange(options)[None, :, None]
    factor = factor.reshape(groups * options, -1)
    size = rng.integers(50, 100, groups)[:, None] * (1 + np.arange(options))
    return Problem(
        [f"g{g}" for g in range(groups)],
        [[f"o{i}" for i in range(options)]] * groups,
        0.5 * np.square(factor).sum(axis=1),
        {"bytes": size.ravel()},
        {"bytes": float(0.6 * size[:, -1].sum())},
        PairTerms(factor=factor),
    )


BROKE_SYEVR = [6497, 16452]
"""Problems with which this routine of LAPACK failed."""


@pytest.mark.parametrize("seed", slow_but([*range(20), *BROKE_SYEVR], [*range(60), *BROKE_SYEVR]))
def test_no_choice_lies_below_the_bounds(seed):
    problem = small_problem(seed)
    found = semidefinite_bound(problem)
    for choice, objective in feasible_choices(problem):
        assert found.value <= objective + TOLERANCE * (1 + abs(objective))
        assert found.at_least[problem.flat(choice)].max() <= objective + TOLERANCE * (1 + abs(objective))
    assert np.add.reduceat(found.share, problem.group_offsets[:-1]) == pytest.approx(1.0)
    assert (found.share >= 0).all()


@pytest.mark.parametrize("changed", ["pairs", "resources"])
def test_the_state_of_another_problem_is_not_taken(changed):
    problem = network(4, 3)
    other = {
        "pairs": problem.derived(pairs=PairTerms(factor=-problem.pairs.factor * np.arange(12)[:, None] % 3)),
        "resources": problem.derived(resources={"bytes": problem.resources["bytes"][::-1]}),
    }[changed]
    start = semidefinite_bound(problem).state
    bound = semidefinite_bound(other, start=start)
    assert bound.value == pytest.approx(semidefinite_bound(other).value, abs=1e-12)
    assert bound.state is not start
    assert semidefinite_bound(problem, start=start).state is start


@pytest.mark.parametrize("iterations", [20, 60])
def test_an_early_stop_gives_a_valid_bound(monkeypatch, iterations):
    monkeypatch.setattr("solvers.bounds.semidefinite.ITERATIONS", iterations)
    problem = network(4, 3)
    best = min(objective for _, objective in feasible_choices(problem))
    assert semidefinite_bound(problem).value <= best + TOLERANCE


def test_it_is_far_tighter_than_the_dual_where_all_layers_interact():
    problem = network(6, 4)
    best = min(objective for _, objective in feasible_choices(problem))
    gap, dual_gap = best - semidefinite_bound(problem).value, best - dual_bound(problem).value
    assert gap + TOLERANCE >= 0
    assert gap < 0.2 * dual_gap


def test_the_search_ends_when_the_target_is_reached():
    problem = network(6, 4)
    assert semidefinite_bound(problem, target=-1e9).iterations == 20
    assert semidefinite_bound(problem, time_limit=1e-9).iterations == 1


@pytest.mark.parametrize("seed", range(40))
def test_the_convexified_problem_is_the_same_problem(seed):
    problem = small_problem(seed)
    tight = convexified(problem)
    for choice, objective in feasible_choices(problem)[:50]:
        judged = tight.evaluate(choice)
        assert judged.feasible
        assert judged.objective == pytest.approx(objective, abs=1e-9)  # sums of some dozen numbers near 1


def test_the_convexified_problem_has_the_tighter_dual():
    problem = network(6, 4)
    best = min(objective for _, objective in feasible_choices(problem))
    assert dual_bound(problem).value < dual_bound(convexified(problem)).value <= best + TOLERANCE


@pytest.mark.parametrize("solver", slow_but(["auto", "lagrangian"], ["auto", "lagrangian", "milp"]))
def test_solvers_profit(solver):
    problem = network(7, 4, seed=1)
    solution = solve(problem, solver, seed=0)
    best = min(objective for _, objective in feasible_choices(problem))
    assert solution.objective == pytest.approx(best, rel=1e-9)
    if solver != "lagrangian":
        assert solution.status is Status.OPTIMAL
    assert solution.gap < 0.25 * (best - dual_bound(problem).value) / abs(best)


def test_a_problem_of_one_option_a_group_is_bounded_exactly():
    problem = layered_problem(3, bits=(4,))
    assert semidefinite_bound(problem).value == pytest.approx(problem.evaluate([0, 0, 0]).objective, rel=1e-6)


@pytest.mark.parametrize("slow", [True, False])
def test_a_bound_that_would_not_become_useful_in_time_is_not_begun(slow, monkeypatch):
    monkeypatch.setattr(semidefinite, "_projection_s", lambda size: 1.0 if slow else 0.0)
    solution = solve(layered_problem(12, rank=3), "lagrangian", time_limit=60)  # 80 s, for at most 20
    assert ("semidefinite_s" in solution.timing) is not slow
