"""The CQM of a problem has the problem's objective and violations."""

import dimod
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, to_cqm
from formulations.instances import layered_problem, small_problem


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_objective_and_violations_are_those_of_the_problem(seed):
    problem = small_problem(seed)
    encoded = to_cqm(problem)
    choice = np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets))
    sample = dict.fromkeys(range(problem.num_options), 0) | dict.fromkeys(problem.flat(choice).tolist(), 1)
    evaluation = problem.evaluate(choice)
    assert encoded.cqm.objective.energy(sample) == pytest.approx(evaluation.objective, abs=1e-9)
    violations = encoded.cqm.violations(sample, clip=True)
    for name, budget in problem.budgets.items():
        expected = evaluation.violations.get(name, 0.0)
        assert violations[f"budget {name}"] == pytest.approx(expected, abs=1e-9 * (1 + budget))
    assert all(violations[f"group {name}"] == 0 for name in problem.groups)
    assert encoded.decode(sample).tolist() == choice.tolist()


def test_groups_are_discrete_constraints():
    assert len(to_cqm(layered_problem(7)).cqm.discrete) == 7


def test_exact_cqm_solver_finds_the_constrained_optimum():
    problem = layered_problem(4, bits=(2, 4, 8), seed=1)
    encoded = to_cqm(problem)
    best = dimod.ExactCQMSolver().sample_cqm(encoded.cqm).filter(lambda row: row.is_feasible).first
    choices = np.stack(np.meshgrid(*[range(3)] * 4), axis=-1).reshape(-1, 4)
    expected = min(one.objective for one in map(problem.evaluate, choices) if one.feasible)
    assert problem.evaluate(encoded.decode(best.sample)).objective == pytest.approx(expected)


@pytest.mark.parametrize(
    ("sample", "message"), [([1, 1, 0, 1], "options on"), ([1, 0], "one value"), ({0: 1}, "lacks")]
)
def test_decode_refuses_what_is_no_choice(sample, message):
    with pytest.raises(EncodingError, match=message):
        to_cqm(layered_problem(2, bits=(2, 4))).decode(sample)
