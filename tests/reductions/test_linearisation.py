"""Budgets with pair terms as linear ones: exactly the same feasible choices, objectives and uses."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, Problem
from formulations.generators.random_instances import small_problem
from formulations.reductions import linearisation
from formulations.reductions.linearisation import linearised

MOST_CHOICES = 20_000


def every_choice(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(options)) for options in problem.options)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_same_choices_are_feasible_with_the_same_objective_and_use(seed: int) -> None:
    problem = small_problem(seed, max_groups=4, max_options=3, resource_pairs=True)
    linear = linearised(problem)
    assert not linear.problem.paired_budgets
    for choice in every_choice(problem):
        lowered = linear.lower(choice)
        before, after = problem.evaluate(choice), linear.problem.evaluate(lowered)
        assert linear.lift(lowered).tolist() == list(choice)
        assert after.objective == pytest.approx(before.objective, abs=1e-9)
        assert {name: after.usage[name] for name in problem.budgets} == pytest.approx(
            {name: before.usage[name] for name in problem.budgets}
        )
        assert after.feasible == before.feasible


@pytest.mark.parametrize("seed", range(12))
def test_no_wrong_product_is_feasible(seed: int) -> None:
    problem = small_problem(seed, max_groups=3, max_options=3, resource_pairs=True)
    linear = linearised(problem)
    if np.prod([float(len(options)) for options in linear.problem.options]) <= MOST_CHOICES:
        for choice in every_choice(linear.problem):
            if linear.problem.evaluate(choice).feasible:
                assert linear.lower(linear.lift(choice)).tolist() == list(choice)


def test_too_many_numbers_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearisation, "MAX_NUMBERS", 10)
    problem = next(p for p in (small_problem(s, resource_pairs=True) for s in range(20)) if p.paired_budgets)
    with pytest.raises(EncodingError, match="linearising the pair terms of r0.* numbers; the limit is 10"):
        linearised(problem)
