"""The nonlinear model is the problem itself: every state's objective and feasibility are `Problem.evaluate`'s."""

import itertools

import numpy as np
import pytest

from formulations import EncodingError, Problem
from formulations.generators.random_instances import layered_problem, small_problem

pytest.importorskip("dwave.optimization")
from formulations.forms.nonlinear import to_nonlinear


def states_of(problem, choices):
    """Objective and feasibility of the model for each choice."""
    encoded = to_nonlinear(problem)
    with encoded.model.lock():
        encoded.model.states.resize(len(choices))
        for at, choice in enumerate(choices):
            encoded.decision.set_state(at, choice)
        objectives = [float(encoded.model.objective.state(at)) for at in range(len(choices))]
        feasible = [bool(encoded.model.feasible(at)) for at in range(len(choices))]
        assert encoded.choices().tolist() == [list(choice) for choice in choices]
    return objectives, feasible


def same_in_both(problem, choices):
    objectives, feasible = states_of(problem, choices)
    judged = [problem.evaluate(choice) for choice in choices]
    np.testing.assert_allclose(objectives, [one.objective for one in judged], rtol=1e-9, atol=1e-9)
    assert feasible == [one.feasible for one in judged]


@pytest.mark.parametrize("seed", range(60))
def test_every_choice_of_a_small_problem_is_the_same_in_the_model(seed):
    problem = small_problem(seed, max_groups=4)
    same_in_both(problem, list(itertools.product(*(range(len(options)) for options in problem.options))))


@pytest.mark.parametrize(("rank", "degree"), [(8, 0), (4, 5), (0, 0)])
def test_random_choices_of_a_larger_problem_are_the_same_in_the_model(rank, degree):
    problem = layered_problem(80, rank=rank, degree=degree, seed=3)
    choices = np.random.default_rng(0).integers(0, 6, size=(30, problem.num_groups))
    same_in_both(problem, [tuple(choice) for choice in choices.tolist()])


def test_a_factor_stays_a_factor():
    """The nodes do not grow with the number of groups, and the state grows linearly."""
    models = [to_nonlinear(layered_problem(groups, rank=4)).model for groups in (10, 1000)]
    assert models[0].num_nodes() == models[1].num_nodes()
    assert models[1].state_size() < 200 * models[0].state_size()


def test_a_single_option_can_be_stated():
    same_in_both(Problem(["a"], [["keep"]], [2.0], {"bytes": [3.0]}, {"bytes": 3.0}), [(0,)])


def test_a_state_that_is_no_choice_is_refused():
    encoded = to_nonlinear(small_problem(3))
    with pytest.raises(EncodingError, match="whole numbers"):
        encoded.decode(np.full(encoded.decision.shape(), 0.5))
