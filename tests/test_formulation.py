"""The prediction that a solver minimises cannot be exploited: no choice is predicted below its share of what its
options lose alone, and a single change is predicted as it was measured.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from formulations import Problem
from qcompress import PAIR_STRENGTH, Measurement, formulate, low_rank, measure, prune_quantize
from qcompress.errors import OptionsError
from qcompress.formulation import consistent_rows
from solvers import solve
from tests.models import Residual, seeded

ROUNDING = 1e-9  # of sums of float64 numbers, relative to the sum of their sizes
STRENGTHS = (0.25, PAIR_STRENGTH, 1.0)


@cache
def small() -> Measurement:
    """Four parts of at most five options: every choice can be tried."""
    data = [torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(0))]
    return measure(
        seeded(Residual), data, prune_quantize(bits=(2, 3, 4), sparsity=(0,)) + low_rank(ratios=(0.5,), whitened=False)
    )


@cache
def deep() -> Measurement:
    """Twenty parts, more choices than can be tried."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(6, 6), nn.Tanh())))
    return measure(model, [torch.randn(32, 6)], prune_quantize(bits=(2, 3, 4, 6), sparsity=(0,)), loss="mse")


def drawn(measurement: Measurement, seed: int, *, negative: bool = False) -> Measurement:
    """Costs and effects over many orders of magnitude that know nothing of each other; keeping costs nothing."""
    rng = np.random.default_rng(seed)
    count, columns = len(measurement.cost), int(rng.integers(1, 4))
    size = 10.0 ** rng.uniform(-6, 2, count)
    cost = 10.0 ** rng.uniform(-6, 2, count) * (rng.choice([-1, 0, 1], count) if negative else 1)
    factor = rng.normal(size=(count, columns)) * size[:, None]
    kept = np.cumsum([0, *(len(options) for options in measurement.transforms[:-1])])
    cost[kept], factor[kept] = 0.0, 0.0
    return replace(measurement, cost=cost, factor=factor)


def below_share(problem: Problem, strength: float) -> Problem:
    """The problem whose least objective shows how far a choice gets below its share: additive part less the share."""
    harmful = np.maximum(problem.cost, 0.0)
    return Problem(problem.groups, problem.options, strength * harmful, problem.resources, {}, problem.pairs)


def descended(problem: Problem, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """A choice that no single change makes better."""
    while True:
        before = choice.copy()
        for group, options in enumerate(problem.options):
            tried = [np.r_[choice[:group], option, choice[group + 1 :]] for option in range(len(options))]
            choice = min(tried, key=lambda own: problem.evaluate(own).objective)
        if (choice == before).all():
            return choice


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), strength=st.sampled_from(STRENGTHS), negative=st.booleans())
def test_no_choice_at_all_is_predicted_below_its_share_of_what_its_options_lose_alone(
    seed: int, strength: float, negative: bool
) -> None:
    measurement = drawn(small(), seed, negative=negative)
    problem = formulate(measurement, {"bytes": 1.0}, pairs=strength)
    worst = solve(below_share(problem, strength), "brute-force")
    assert worst.objective is not None
    assert worst.objective >= -ROUNDING * np.abs(measurement.cost).sum()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), strength=st.sampled_from(STRENGTHS))
def test_a_search_for_a_choice_below_its_share_finds_none(seed: int, strength: float) -> None:
    measurement = drawn(deep(), seed)
    problem = formulate(measurement, {"bytes": 1.0}, pairs=strength)
    hunted = below_share(problem, strength)
    rng = np.random.default_rng(seed)
    start = np.array([rng.integers(len(options)) for options in problem.options])
    for choice in (start, descended(hunted, start)):
        additive = measurement.cost[problem.flat(choice)].sum()
        objective = problem.evaluate(choice).objective
        assert objective >= (1 - strength) * additive - ROUNDING * measurement.cost.sum()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("solver", ["brute-force", "anneal", "lagrangian"])
def test_no_solver_finds_a_choice_of_a_measured_model_that_loses_less_than_nothing(
    solver: str, strength: float
) -> None:
    measurement = replace(small(), factor=30 * small().factor)  # curvature that has nothing to do with the costs
    problem = formulate(measurement, {"bytes": 0.4}, pairs=strength)
    solution = solve(problem, solver, time_limit=2, seed=0)
    assert solution.choice is not None
    assert solution.objective is not None
    additive = measurement.cost[problem.flat(solution.choice)].sum()
    assert solution.objective >= (1 - strength) * additive * (1 - ROUNDING) > -ROUNDING
    mixed = Problem(
        problem.groups,
        problem.options,
        problem.cost,
        problem.resources,
        problem.budgets,
        fixed=problem.fixed,
        pairs=replace(problem.pairs, factor=measurement.factor),
    )
    assert solve(mixed, "brute-force").objective < 0  # which the terms as they were measured do


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), negative=st.booleans())
def test_a_single_change_is_predicted_as_it_was_measured(seed: int, negative: bool) -> None:
    measurement = drawn(small(), seed, negative=negative)
    problem = formulate(measurement, {"bytes": 1.0})
    for group, (options, offset) in enumerate(zip(problem.options, problem.group_offsets, strict=False)):
        for option in range(len(options)):
            choice = np.zeros(problem.num_groups, dtype=np.int64)
            choice[group] = option
            assert problem.evaluate(choice).objective == pytest.approx(measurement.cost[offset + option], rel=1e-12)


def test_a_sketch_of_very_many_options_cannot_be_exploited_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.measuring.sums.MAX_EXACT", 3)
    monkeypatch.setattr("qcompress.measuring.sums.SKETCH_RANK", 4)
    data = [torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(0))]
    measurement = measure(seeded(Residual), data, prune_quantize(bits=(2, 3, 4), sparsity=(0,)))
    assert measurement.factor.shape[1] == 4
    problem = formulate(measurement, {"bytes": 1.0})
    worst = solve(below_share(problem, PAIR_STRENGTH), "brute-force")
    assert worst.objective is not None
    assert worst.objective >= -ROUNDING


def test_rows_whose_half_square_is_below_the_cost_stay_as_they_were_measured() -> None:
    factor = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [1.0, 0.0]])
    rows = consistent_rows(factor, np.array([0.5, 0.5, 1.0, -1e-17]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0], [0.0, 0.0]], rtol=1e-15)


@pytest.mark.parametrize("pairs", [-0.1, 1.5, float("nan"), "half"])
def test_a_strength_outside_its_range_is_refused(pairs: object) -> None:
    with pytest.raises(OptionsError, match=r"pairs must be True, False or a strength from 0.0 to 1.0"):
        formulate(small(), {"bytes": 0.5}, pairs=pairs)  # type: ignore[arg-type]


def test_strength_zero_is_the_additive_problem() -> None:
    assert not formulate(small(), {"bytes": 0.5}, pairs=0.0).pairs
    full, half = (formulate(small(), {"bytes": 0.5}, pairs=pairs).pairs for pairs in (1.0, True))
    assert full is not None
    assert half is not None
    np.testing.assert_allclose(half.factor, full.factor * PAIR_STRENGTH**0.5)  # type: ignore[operator]
