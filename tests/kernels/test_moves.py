"""The compiled objective is that of `Problem.evaluate`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formulations import PairTerms, Problem
from formulations.generators.random_instances import small_problem
from solvers.kernels.moves import judge_all, to_arrays


@given(seed=st.integers(0, 10**6), length=st.sampled_from([0.0, 1e8, 1e150]))
def test_objectives_of_many_choices_are_those_of_evaluate_beside_a_long_row_too(seed: int, length: float) -> None:
    plain, rng = small_problem(seed), np.random.default_rng(seed)
    rows = np.zeros((plain.num_options, 3))
    rows[:, 1:] = rng.normal(size=(plain.num_options, 2))
    rows[rng.integers(plain.num_options), 0] = length
    problem = plain.derived(pairs=PairTerms(sparse=plain.pairs.sparse, factor=rows), resource_pairs={}, offset=0.0)
    choices = rng.integers(0, np.diff(problem.group_offsets), (20, problem.num_groups))
    values, _ = judge_all(to_arrays(problem), choices + problem.group_offsets[:-1])
    shorter = Problem(
        problem.groups, problem.options, problem.cost, {}, {}, PairTerms(sparse=plain.pairs.sparse, factor=rows[:, 1:])
    )
    exact = [shorter.evaluate(choice).objective for choice in choices]
    assert values.tolist() == pytest.approx(exact, abs=1e-9)
