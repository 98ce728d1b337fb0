"""The QUBO of a problem: its ground state, found by enumeration, is the constrained optimum."""

import itertools

import dimod
import numpy as np
import pytest
import scipy.sparse
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from formulations import EncodingError, PairTerms, Problem, to_bqm
from formulations.forms.bqm import ENCODINGS
from formulations.forms.precision import coefficient_report
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.scaling import scaled

SEEDS = st.integers(0, 100_000)
MOST_VARIABLES = 15


def all_choices(problem):
    return itertools.product(*map(range, np.diff(problem.group_offsets)))


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


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_energy_of_a_choice_is_its_objective_and_its_state_decodes_to_it(encoding, seed):
    problem = small_problem(seed, max_options=9)
    whole = all((problem.resources[name] % 1 == 0).all() for name in problem.budgets)
    choice = np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets))
    evaluation = problem.evaluate(choice)
    assume(whole and evaluation.feasible)  # then slack bits make up the budgets exactly
    encoded = to_bqm(problem, encoding)
    assume(encoded.bqm.num_variables)
    state = encoded.encode(choice)
    scale = 1 + abs(encoded.bqm.offset)
    assert encoded.bqm.energy((state, encoded.bqm.variables)) == pytest.approx(evaluation.objective, abs=1e-9 * scale)
    assert encoded.decode(state).tolist() == choice.tolist()
    assert encoded.valid(state[None]).all()


BETWEEN_TWO = Problem(
    ["a", "b"],
    [["x", "y"]] * 2,
    np.zeros(4),
    {},
    {},
    PairTerms(scipy.sparse.csr_array(-np.kron([[0.0, 1.0], [0.0, 0.0]], np.ones((2, 2))))),
)
WORST = {  # two groups gain by switching everything on; a wrong wall, or an unused code, subtracts a dear option
    "one-hot": BETWEEN_TWO,
    "domain-wall": Problem(["a"], [["x", "y", "z"]], [0.0, 1.0, 0.0], {"m": [0, 1, 2]}, {"m": 2}),
    "binary": Problem(["a"], [["x", "y", "z"]], [1.0, 0.0, 0.0], {"m": [0, 1, 2]}, {"m": 2}),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_penalties_are_as_small_as_can_be_in_the_worst_case(encoding):
    problem = WORST[encoding]
    for strength, enough in ((1.0, True), (0.95, False)):
        encoded = to_bqm(problem, encoding, prices=dict.fromkeys(problem.budgets, 0.0), strength=strength)
        ground = dimod.ExactSolver().sample(encoded.bqm).first.sample
        assert encoded.valid([[ground[v] for v in encoded.bqm.variables]]).all() == enough


def test_strength_may_differ_from_group_to_group():
    problem = layered_problem(3)
    weak, mixed, strong = (
        to_bqm(problem, "one-hot", prices={"bytes": 0.0}, strength=strength).penalty
        for strength in (0.5, np.array([0.5, 1.0, 1.0]), 1.0)
    )
    assert mixed.tolist() == [weak[0], strong[1], strong[2]]


def test_one_hot_state_is_one_bit_an_option():
    encoded = to_bqm(Problem(["a", "b"], [["x", "y", "z"], ["x", "y"]], np.zeros(5), {}, {}))
    assert encoded.encode([2, 0]).tolist() == [0, 0, 1, 1, 0]


def coded_problem(sizes, seed):
    """Groups of many options; pair terms, cost and use arbitrary, or polynomials of low degree in the place."""
    rng = np.random.default_rng(seed)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(size) for size in sizes])
    slope, start = rng.normal(size=(2, len(sizes), 2))
    factor = slope[group_of] * place[:, None] + start[group_of]
    if seed % 2:
        factor += rng.normal(size=factor.shape)
    cost = rng.normal(size=len(place)) if seed % 3 else (slope[group_of, 0] * (place - 3.0) ** 2)
    options = [[f"o{i}" for i in range(size)] for size in sizes]
    names = [f"g{i}" for i in range(len(sizes))]
    pairs = PairTerms(factor=factor) if seed % 5 else None
    return Problem(names, options, cost, {"m": place.astype(float)}, {"m": float(place.max())}, pairs)


@pytest.mark.parametrize("encoding", ["domain-wall", "binary"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), SEEDS)
def test_ground_state_of_large_groups_is_valid_and_the_best_at_these_prices(encoding, sizes, seed):
    assume(0 < sum(sizes) - len(sizes) <= MOST_VARIABLES)
    problem = coded_problem(sizes, seed)
    encoded = to_bqm(problem, encoding, prices={"m": 0.3})
    states = (np.arange(2**encoded.bqm.num_variables)[:, None] >> np.arange(encoded.bqm.num_variables)) & 1
    energies = encoded.bqm.energies((states, range(encoded.bqm.num_variables)))
    judged = [problem.evaluate(choice) for choice in all_choices(problem)]
    best = min(one.objective + 0.3 * (one.usage["m"] - problem.budgets["m"]) for one in judged)
    assert energies.min() == pytest.approx(best, abs=1e-8)
    assert encoded.valid(states[energies < energies.min() + 1e-9]).all()
    assert encoded.valid(states).sum() == len(judged)  # one state a choice, no other


@pytest.mark.parametrize(("size", "bits"), [(2, 1), (3, 2), (4, 2), (6, 3), (8, 3), (16, 4)])
def test_binary_takes_no_auxiliary_bits_where_numbers_are_affine_in_the_place(size, bits):
    problem = coded_problem([size, size], 6)  # affine pair terms, quadratic costs
    encoded = to_bqm(problem, "binary", prices={"m": 0.3})
    assert encoded.bqm.num_variables == 2 * bits
    assert to_bqm(problem, "domain-wall", prices={"m": 0.3}).bqm.num_variables == 2 * (size - 1)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 8, 13])
def test_binary_takes_at_most_as_many_variables_as_domain_wall(size):
    arbitrary = coded_problem([size, size], 1)
    assert to_bqm(arbitrary, "binary", prices={"m": 0.3}).bqm.num_variables == 2 * (size - 1)


def test_binary_of_cubic_costs_needs_one_auxiliary_bit_for_eight_options():
    place = np.arange(8.0)
    problem = Problem(["a"], [[f"{p}" for p in range(8)]], (place - 4.3) ** 3, {"m": place}, {"m": 7})
    encoded = to_bqm(problem, "binary", prices={"m": 0.0})
    assert encoded.bqm.num_variables == 4
    assert encoded.decode(dimod.ExactSolver().sample(encoded.bqm).first.sample).tolist() == [0]


def test_binary_refuses_groups_beyond_what_differences_resolve():
    problem = Problem(["a"], [[f"{p}" for p in range(1025)]], np.zeros(1025), {}, {})
    with pytest.raises(EncodingError, match=r"at most 1024 options a group, found 1025; use 'domain-wall'"):
        to_bqm(problem, "binary")


def test_binary_refuses_what_its_monomials_would_couple():
    num = 2000 * 6
    chain = scipy.sparse.coo_array((np.ones(num - 6), (np.arange(num - 6), np.arange(6, num))), shape=(num, num))
    options = [[f"{p}" for p in range(600)]] * 20
    problem = Problem([f"g{i}" for i in range(20)], options, np.zeros(num), {}, {}, PairTerms(_between(chain, 600)))
    with pytest.raises(EncodingError, match=r"up to 6840000 couplings, more than 5000000; use 'domain-wall'"):
        to_bqm(problem, "binary")


def _between(couplings, size):
    """Couplings between different groups of ``size`` options."""
    keep = couplings.row // size != couplings.col // size
    return scipy.sparse.csr_array(
        (couplings.data[keep], (couplings.row[keep], couplings.col[keep])), shape=couplings.shape
    )


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


def test_coefficient_report_counts_what_rounding_takes():
    problem = layered_problem(8, seed=1)
    report = coefficient_report(to_bqm(problem, "domain-wall", prices={"bytes": 1e-6}))
    fine = coefficient_report(to_bqm(problem, "domain-wall", prices={"bytes": 1e-6}), bits=40)
    assert report.quadratic[0] < report.quadratic[1]
    assert report.dynamic_range_bits > 5
    assert 0.2 < report.lost_couplings < 1
    assert report.moves_kept < fine.moves_kept == 1.0
    assert report.order_kept < fine.order_kept == 1.0
    assert fine.lost_couplings < 0.01
    assert "5 bits of precision" in str(report)


def test_coefficient_report_of_coefficients_that_a_processor_holds_loses_nothing():
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0.0, 1.0, 0.0, 1.0], {}, {})
    report = coefficient_report(to_bqm(problem, "domain-wall"))
    assert report.linear == (0.5, 0.5)  # a bit of weight 1 is a spin of weight 1/2
    assert (report.couplings, report.quadratic, report.dynamic_range_bits) == (0, None, 0.0)
    assert (report.lost_biases, report.moves_kept, report.order_kept) == (0.0, 1.0, 1.0)
    assert report.to_json()["bits"] == 5


def test_coefficient_report_scales_with_the_problem():
    problem = layered_problem(6)
    one, large = (
        coefficient_report(to_bqm(scaled(problem, scale).problem, prices={"bytes": scale * 1e-6}))
        for scale in (1.0, 2.0**20)
    )
    assert large.lost_couplings == one.lost_couplings
    assert large.moves_kept == one.moves_kept
    assert large.dynamic_range_bits == pytest.approx(one.dynamic_range_bits)
