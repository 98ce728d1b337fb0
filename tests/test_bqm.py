"""The QUBO of a problem: its ground state, found by enumeration, is the constrained optimum."""

import itertools

import dimod
import numpy as np
import pytest
import scipy.sparse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from formulations import EncodingError, PairTerms, Problem, to_bqm
from formulations.bqm import ENCODINGS
from formulations.instances import layered_problem, small_problem

SEEDS = st.integers(0, 100_000)
MOST_VARIABLES = 15


def all_choices(problem):
    return itertools.product(*map(range, np.diff(problem.group_offsets)))


def encoded_sample(problem, choice, size):
    sample = np.zeros(size, dtype=np.int8)
    sample[problem.flat(choice)] = 1
    return sample


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=80, deadline=None)
@given(SEEDS)
def test_ground_state_with_slack_bits_is_the_constrained_optimum(encoding, seed):
    problem = small_problem(seed, max_groups=4, max_options=3)
    whole = all((problem.resources[name] % 1 == 0).all() for name in problem.budgets)
    evaluations = [one for choice in all_choices(problem) if (one := problem.evaluate(choice)).feasible]
    assume(whole and evaluations)
    encoded = to_bqm(problem, encoding)
    assume(0 < encoded.bqm.num_variables <= MOST_VARIABLES)
    ground = dimod.ExactSolver().sample(encoded.bqm).first
    found = problem.evaluate(encoded.decode(ground.sample))
    best = min(one.objective for one in evaluations)
    assert found.feasible
    assert found.objective == pytest.approx(best, abs=1e-8)
    assert ground.energy == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=80, deadline=None)
@given(SEEDS)
def test_ground_state_at_given_prices_is_valid_and_the_best_at_these_prices(encoding, seed):
    problem = small_problem(seed, max_groups=4, max_options=3)
    assume(problem.num_options <= MOST_VARIABLES)
    prices = dict.fromkeys(problem.budgets, 0.4)
    encoded = to_bqm(problem, encoding, prices=prices)
    assume(encoded.bqm.num_variables)
    samples = dimod.ExactSolver().sample(encoded.bqm)
    order = [samples.variables.index(v) for v in encoded.bqm.variables]

    def priced(choice):
        evaluation = problem.evaluate(choice)
        excess = sum(0.4 * (evaluation.usage[name] - budget) for name, budget in problem.budgets.items())
        return evaluation.objective + excess

    best = min(map(priced, all_choices(problem)))
    states, energies = samples.record.sample[:, order], samples.record.energy
    assert energies.min() == pytest.approx(best, abs=1e-8)
    assert encoded.valid(states[energies < energies.min() + 1e-9]).all()


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_energy_of_a_valid_state_is_the_objective(seed):
    problem = small_problem(seed)
    problem = Problem(problem.groups, problem.options, problem.cost, {}, {}, problem.pairs, problem.offset)
    encoded = to_bqm(problem)
    choice = np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets))
    sample = encoded_sample(problem, choice, encoded.bqm.num_variables)
    assert encoded.bqm.energy((sample, encoded.bqm.variables)) == pytest.approx(problem.evaluate(choice).objective)
    assert encoded.decode(sample).tolist() == choice.tolist()
    assert encoded.valid(sample[None]).all()


def test_decode_takes_the_cheapest_where_a_sample_leaves_it_open():
    problem = Problem(["a", "b"], [["x", "y", "z"]] * 2, [3, 2, 1, 1, 2, 3], {}, {})
    encoded = to_bqm(problem)
    assert encoded.decode([1, 1, 0, 0, 0, 0]).tolist() == [1, 0]  # several on: the cheapest of them; none: of all
    assert encoded.decode(dict(enumerate([0, 0, 0, 0, 1, 1]))).tolist() == [2, 1]
    assert encoded.valid([[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).tolist() == [True, False]


def test_domain_wall_has_a_bit_less_a_group_and_every_monotone_state_is_a_choice():
    problem = Problem(["a"], [["x", "y", "z"]], [3, 2, 1], {"m": [1, 2, 3]}, {"m": 3})
    encoded = to_bqm(problem, "domain-wall", prices={"m": 0.0})
    assert encoded.bqm.num_variables == 2
    states = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    assert encoded.decode_all(states)[:3].ravel().tolist() == [0, 1, 2]  # in the order of their use
    assert encoded.valid(states).tolist() == [True, True, True, False]
    energies = encoded.bqm.energies((states, encoded.bqm.variables))
    assert energies[:3].tolist() == pytest.approx([3, 2, 1])
    assert energies[3] > 3


def test_decode_refuses_a_sample_of_other_variables():
    encoded = to_bqm(small_problem(3))
    with pytest.raises(EncodingError, match="variables"):
        encoded.decode([0, 1])
    with pytest.raises(EncodingError, match="lacks variable"):
        encoded.decode({"a": 1})


def test_unknown_encoding_lists_the_known_ones():
    with pytest.raises(EncodingError, match="one-hot"):
        to_bqm(small_problem(3), "unary")


def test_slack_bits_refuse_fractions():
    with pytest.raises(EncodingError, match="prices"):
        to_bqm(Problem(["a"], [["x", "y"]], [0, 1], {"time_s": [0.5, 0.25]}, {"time_s": 0.3}))


@pytest.mark.parametrize("prices", [{}, {"bytes": -1.0}, {"bytes": np.nan}, {"bytes": 1.0, "macs": 1.0}])
def test_prices_must_fit_the_budgets(prices):
    with pytest.raises(EncodingError, match="price"):
        to_bqm(layered_problem(3), prices=prices)


def test_a_factor_too_large_to_expand_is_refused():
    with pytest.raises(EncodingError, match="anneal"):
        to_bqm(layered_problem(1200), prices={"bytes": 0.0})


def test_sparse_pairs_stay_sparse_with_prices():
    sparse = scipy.sparse.csr_array(([1.0], ([0], [5])), shape=(6, 6))
    problem = Problem(["a", "b", "c"], [["x", "y"]] * 3, np.zeros(6), {"m": np.ones(6)}, {"m": 3}, PairTerms(sparse))
    assert to_bqm(problem, prices={"m": 0.1}).bqm.num_interactions == 1 + 3
