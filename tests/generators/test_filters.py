"""Filter pruning with bits removed per layer: every form holds the same H, and the counts are its proven optimum."""

import itertools

import dimod
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, InfeasibleBudgetError, InvalidProblemError
from formulations.generators.filters.counts import best_choice, filter_counts, fit_size
from formulations.generators.filters.qubo import code_weights, filter_bqm, filter_problem
from formulations.generators.filters.tables import FilterChoice, FilterLayer, FilterNetwork, stored_bytes
from solvers import Status, solve

SEEDS = st.integers(0, 10**6)


def small_network(seed: int, *, most_layers: int = 3, most_filters: int = 3, widths: int = 3) -> FilterNetwork:
    """Up to three layers, some of them tied, with equal and zero scores among the rest."""
    rng = np.random.default_rng(seed)
    num_layers = int(rng.integers(1, most_layers + 1))
    ties = rng.integers(0, num_layers, num_layers)
    counts = rng.integers(1, most_filters + 1, num_layers)
    low = int(rng.integers(1, 4))
    layers = tuple(
        FilterLayer(
            name=f"conv{i}",
            scores=rng.choice([0.0, 0.5, 1.0, *rng.random(4)], counts[ties[i]]),
            weights_per_filter=int(rng.integers(1, 20)),
            bit_score=float(rng.choice([0.0, *rng.random(4)])),
            tied=f"set{ties[i]}",
        )
        for i in range(num_layers)
    )
    high = low + int(rng.integers(0, widths))
    return FilterNetwork(
        layers=layers, low_bits=low, high_bits=high, beta=float(rng.random()), fixed_bytes=int(rng.integers(50))
    )


def all_choices(network: FilterNetwork) -> list[FilterChoice]:
    """Every choice that leaves each set a filter, also without the one of largest score."""
    masks = [
        [np.array(mask) for mask in itertools.product([False, True], repeat=len(one.scores)) if not all(mask)]
        for one in network.sets
    ]
    widths = [range(network.low_bits, network.high_bits + 1)] * len(network.layers)
    return [
        FilterChoice(pruned=pruned, bits=np.array(bits))
        for pruned in itertools.product(*masks)
        for bits in itertools.product(*widths)
    ]


def objective_by_loops(network: FilterNetwork, choice: FilterChoice, gamma: float) -> float:
    """``H`` as it is written, filter by filter."""
    members: dict[str, list[int]] = {}
    for place, layer in enumerate(network.layers):
        members.setdefault(layer.tied, []).append(place)
    value = stored = full = 0.0
    for places, pruned in zip(members.values(), choice.pruned, strict=True):
        total = 0.0
        for place in places:
            layer = network.layers[place]
            for i, gone in enumerate(pruned):
                total += layer.scores[i] * gone
                stored += (not gone) * (layer.weights_per_filter * choice.bits[place] + 32)
                full += layer.weights_per_filter * network.high_bits + 32
            value += network.beta * (layer.bit_score * (network.high_bits - choice.bits[place])) ** 2
        value += total**2
    return value - gamma * (1 - stored / full)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.3, 2.0, 30.0]))
def test_problem_qubo_and_judge_hold_the_same_objective(seed: int, gamma: float) -> None:
    network = small_network(seed)
    stated, encoded = filter_problem(network, gamma), filter_bqm(network, gamma)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        choice = rng.integers(0, np.diff(stated.problem.group_offsets))
        decoded = stated.decode(choice)
        expected = objective_by_loops(network, decoded, gamma)
        assert stated.problem.evaluate(choice).objective == pytest.approx(expected, abs=1e-9)
        assert network.evaluate(decoded, gamma).objective == pytest.approx(expected, abs=1e-9)
        assert stated.encode(decoded).tolist() == choice.tolist()
        sample = rng.integers(0, 2, encoded.bqm.num_variables)
        energy = encoded.bqm.energy((sample, range(len(sample))))
        assert energy == pytest.approx(objective_by_loops(network, encoded.decode(sample), gamma), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.3, 2.0, 30.0]))
def test_counts_find_the_least_objective_of_all_choices(seed: int, gamma: float) -> None:
    network = small_network(seed)
    least = min(network.evaluate(choice, gamma).objective for choice in all_choices(network))
    assert network.evaluate(best_choice(network, gamma), gamma).objective == pytest.approx(least, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_qubo_has_the_same_optimum(seed: int) -> None:
    network = small_network(seed, most_layers=2)
    encoded = filter_bqm(network, 3.0)
    best = network.evaluate(best_choice(network, 3.0), 3.0).objective
    if not encoded.bqm.num_variables:
        assert best == 0
        return
    ground = dimod.ExactSolver().sample(encoded.bqm).first
    assert ground.energy == pytest.approx(best, abs=1e-9)
    assert network.evaluate(encoded.decode(ground.sample), 3.0).objective == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_the_hard_budget_is_met_with_the_least_loss_of_all_choices(seed: int, share: float) -> None:
    network = small_network(seed)
    judged = [network.evaluate(choice) for choice in all_choices(network)]
    sizes = [one.size_bytes for one in judged]
    budget = min(sizes) + share * (max(sizes) - min(sizes))
    least = min(one.objective for one in judged if one.size_bytes <= budget)
    counts = filter_counts(network, budget)
    solution = solve(counts.problem, "dp")
    assert solution.status is Status.OPTIMAL
    found = network.evaluate(counts.decode(solution.choice))
    assert found.objective == pytest.approx(least, abs=1e-9)
    assert solution.objective == pytest.approx(least, abs=1e-9)
    assert found.size_bytes == solution.usage["bytes"] <= budget


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_gamma_is_bisected_to_a_size_and_never_beats_the_hard_budget(seed: int, share: float) -> None:
    network = small_network(seed)
    sizes = [network.evaluate(choice).size_bytes for choice in all_choices(network)]
    budget = min(sizes) + share * (max(sizes) - min(sizes))
    gamma, choice = fit_size(network, budget)
    found = network.evaluate(choice)
    assert found.size_bytes <= budget
    for other in (0.0, *np.geomspace(1e-4, 1e4, 60), 0.5 * gamma, 0.9 * gamma, 1.1 * gamma):
        worth = network.evaluate(best_choice(network, other))
        assert worth.size_bytes > budget or worth.removed >= found.removed - 1e-12
    if gamma > 1e-6:  # and no other choice is as good there (what costs nothing goes at any γ above 0)
        best = network.evaluate(choice, gamma).objective
        rivals = [network.evaluate(one, gamma) for one in all_choices(network)]
        assert all(one.removed == found.removed for one in rivals if one.objective <= best + 1e-12)
    counts = filter_counts(network, budget)
    optimum = solve(counts.problem, "dp").objective
    assert optimum is not None
    assert found.objective >= optimum - 1e-9


def test_gamma_for_an_impossible_size_is_refused() -> None:
    network = FilterNetwork(layers=(layer(),), fixed_bytes=100)
    with pytest.raises(InfeasibleBudgetError, match=r"at most 100 bytes: one filter per set at 2 bits.*take 107"):
        fit_size(network, 100)


@pytest.mark.parametrize("solver", ["anneal", "ga", "sa", "auto"])
def test_solvers_take_the_problem_and_reach_the_optimum_of_a_small_network(solver: str) -> None:
    rng = np.random.default_rng(1)
    layers = tuple(
        FilterLayer(name=f"c{i}", scores=rng.random(6), weights_per_filter=9, bit_score=0.2, tied="s" * (i > 1))
        for i in range(4)
    )
    network = FilterNetwork(layers=layers)
    gamma, choice = fit_size(network, 0.5 * network.full_bits / 8)
    stated = filter_problem(network, gamma)
    solution = solve(stated.problem, solver, seed=0)
    assert solution.objective == pytest.approx(network.evaluate(choice, gamma).objective, abs=1e-9)
    assert network.evaluate(stated.decode(solution.choice), gamma).removed > 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300))
def test_a_code_reaches_every_number_and_no_more(most: int) -> None:
    weights = code_weights(most)
    sums = {0}
    for weight in weights.tolist():
        sums |= {weight + one for one in sums}
    assert sums == set(range(most + 1))
    assert len(weights) == most.bit_length()


def test_a_layer_is_stored_in_codes_scales_and_a_bitmap() -> None:
    assert stored_bytes(10, 9, 0, 3) == 34 + 40
    assert stored_bytes(10, 9, 1, 3) == 31 + 36 + 2


def layer(**changes: object) -> FilterLayer:
    arguments = {"name": "conv", "scores": [3, 1, 2], "weights_per_filter": 8, "bit_score": 0.5}
    return FilterLayer(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": []}, r"one score per filter, shape \(N,\), found \(0,\)"),
        ({"scores": [[1, 2]]}, r"found \(1, 2\)"),
        ({"scores": [1, np.nan]}, "must be finite and not negative"),
        ({"scores": [1, -1]}, "must be finite and not negative"),
        ({"scores": ["low"]}, "must be numbers"),
        ({"bit_score": -1.0}, "must be finite and not negative"),
        ({"weights_per_filter": 0}, "at least one weight, found 0"),
    ],
)
def test_a_table_that_is_none_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        layer(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "at least one layer"),
        ({"layers": (layer(), layer())}, "found 'conv' twice"),
        ({"low_bits": 0}, "found 0 to 8"),
        ({"low_bits": 9}, "found 9 to 8"),
        ({"beta": -1.0}, "must not be negative"),
        (
            {"layers": (layer(name="a", tied="s"), layer(name="b", tied="s", scores=[1, 2]))},
            "equally many filters, found {'a': 3, 'b': 2} in 's'",
        ),
    ],
)
def test_a_network_that_is_none_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        FilterNetwork(**{"layers": (layer(),), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pruned", "bits", "message"),
    [
        ([True, True, True], [4], "prunes every filter of 'conv'"),
        ([True, False], [4], r"shapes \[\(2,\)\]"),
        ([True, False, False], [4, 4], r"layers of shape \(2,\), .*and 1 layers"),
        ([True, False, False], [1], "'conv' 1 bits, allowed are 2 to 8"),
    ],
)
def test_a_choice_that_is_none_is_refused(pruned: list[bool], bits: list[int], message: str) -> None:
    network = FilterNetwork(layers=(layer(),))
    with pytest.raises(InvalidProblemError, match=message):
        network.evaluate(FilterChoice(pruned=(pruned,), bits=bits))


def test_what_does_not_fit_a_form_is_refused() -> None:
    network = FilterNetwork(layers=(layer(),))
    for form in (filter_problem, filter_bqm, best_choice):
        for gamma in (-1, np.nan, np.inf):
            with pytest.raises(
                InvalidProblemError, match=f"gamma must be a finite number, not negative, found {gamma}"
            ):
                form(network, gamma)
    with pytest.raises(InfeasibleBudgetError, match="at most nan bytes"):
        fit_size(network, np.nan)
    with pytest.raises(InvalidProblemError, match="prunes filter 0 of 'conv', whose score is the largest"):
        filter_problem(network, 1).encode(FilterChoice(pruned=([True, False, False],), bits=[4]))
    with pytest.raises(EncodingError, match=r"each of 5 variables, found shape \(2,\)"):
        filter_bqm(network, 1).decode([0, 1])
    with pytest.raises(EncodingError, match="lacks variable 1"):
        filter_bqm(network, 1).decode({0: 1})
