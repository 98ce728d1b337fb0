"""dimod samplers as solvers, and simulated annealing on the QUBO."""

from functools import partial
from typing import ClassVar

import dimod
import dwave.samplers
import numpy as np
import pytest
import scipy.sparse

from formulations import PairTerms, Problem, to_bqm
from formulations.forms.bqm import ENCODINGS
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import InvalidOptionError, SolverError, Status, StopReason, UnsupportedProblemError, run
from solvers.composites.polish import Polish
from solvers.heuristic.anneal import Anneal
from solvers.kernels.repair import repair
from solvers.qubo.bifurcation import bifurcate
from solvers.qubo.dimod_sampler import from_sampler
from solvers.qubo.route import _cheapest
from solvers.qubo.simulated_annealing import beta_range
from tests.quick import slow_but

solve = partial(run.solve, presolve=False)  # the back end itself is tested


@pytest.fixture(scope="module")
def problem():
    return layered_problem(12, seed=5)


@pytest.fixture(scope="module")
def best(problem):
    return solve(problem, Anneal(), seed=0).objective


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sa_reaches_the_best_known_after_polish(problem, best, encoding):
    solution = solve(problem, "sa", seed=1, encoding=encoding)
    assert solution.status is Status.FEASIBLE
    assert solution.objective <= 1.03 * best


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sqa", {}),
        ("tabu", {}),
        ("steepest-descent", {}),
        ("bifurcation", {}),
        ("bifurcation", {"dynamics": "ballistic"}),
        ("openjij", {"rounds": 4}),
        ("openjij", {"algorithm": "sqa", "rounds": 4}),
    ],
)
def test_other_samplers_by_name_come_near_the_best_known(problem, best, name, options):
    if name == "openjij":
        pytest.importorskip("openjij")
    solution = solve(problem, name, seed=1, **options)
    assert solution.objective <= 1.05 * best
    again = solve(problem, name, seed=1, **options)
    assert solution.choice.tolist() == again.choice.tolist()
    assert solution.details == again.details


def test_openjij_reads_differ_though_it_gives_all_reads_of_a_call_one_seed(problem):
    pytest.importorskip("openjij")
    details = solve(problem, "openjij", seed=1, rounds=1, num_reads=4, num_sweeps=2).details
    assert details["samples"] == details["distinct"] == 4


@pytest.mark.parametrize("discrete", [True, False])
def test_bifurcation_finds_the_ground_state_of_a_small_spin_glass(discrete):
    rng = np.random.default_rng(3)
    half = np.triu(rng.normal(size=(12, 12)), 1)
    biases = 0.3 * rng.normal(size=12)
    start = rng.uniform(-0.1, 0.1, size=(2, 12, 50))
    spins = np.sign(bifurcate(biases, half + half.T, start, 500, discrete=discrete))
    every = 1.0 - 2.0 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)

    def energies(states):
        return states @ biases + ((states @ half) * states).sum(axis=1)

    assert energies(spins.T).min() == pytest.approx(energies(every).min())


def test_bifurcation_takes_sparse_couplings_as_dense_ones():
    rng = np.random.default_rng(4)
    half = np.triu(rng.normal(size=(9, 9)) * (rng.random((9, 9)) < 0.4), 1)
    start = rng.uniform(-0.1, 0.1, size=(2, 9, 3))
    dense, sparse = (
        bifurcate(np.ones(9), form(half + half.T), start, 60, discrete=True)
        for form in (np.array, scipy.sparse.csr_array)
    )
    assert np.sign(dense).tolist() == np.sign(sparse).tolist()


def test_each_step_is_reported_and_never_worse_than_the_one_before(problem):
    details = solve(problem, "sa", seed=1, encoding="one-hot", rounds=6).details
    steps = [details[f"objective_{name}"] for name in ("decoded", "repaired", "polished")]
    assert steps == sorted(steps, reverse=True)
    assert details["samples"] == 60
    assert 0 < details["share_feasible_decoded"] <= 1
    assert details["share_feasible_raw"] <= details["share_valid"] <= 1
    assert details["distinct"] <= details["samples"]
    assert details["num_repaired"] + details["repair_failed"] == details["distinct"]
    assert 1 <= details["num_polished"] <= 3 * 6
    assert set(details["prices"]) == {"bytes"}
    assert 0 < details["strength"]["least"] <= details["strength"]["most"] <= 1


def test_sa_is_feasible_whenever_repair_can_be():
    for seed in range(40):
        problem = small_problem(seed, max_groups=4)
        if problem.budgets and repair(problem, np.zeros(problem.num_groups, dtype=int)) is None:
            continue
        assert solve(problem, "sa", seed=seed, rounds=2, num_reads=2, num_sweeps=10).feasible


@pytest.mark.parametrize("budget", [2.0 - 1e-13, 3.9, 5.0])
@pytest.mark.parametrize("name", slow_but(["sa", "steepest-descent"], ["sa", "steepest-descent", "bifurcation"]))
def test_prices_stay_finite_in_any_number_of_rounds(name, budget):
    """A budget that every sample misses, or none, moves its price in one direction only."""
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [1, 0, 3, 1], {"r": [1.0, 2.0, 1.0, 2.5]}, {"r": budget})
    solution = solve(problem, name, seed=0, presolve=False, rounds=50)
    assert solution.objective == {2.0 - 1e-13: 4, 3.9: 2, 5.0: 1}[budget]
    assert all(0 < price < np.inf for price in solution.details["prices"].values())


def test_same_seed_same_answer(problem):
    first, again = (solve(problem, "sa", seed=7, rounds=3) for _ in range(2))
    assert first.choice.tolist() == again.choice.tolist()
    assert first.details == again.details


@pytest.mark.parametrize("name", ["sa", "sqa", "tabu", "steepest-descent", "bifurcation", "openjij"])
def test_a_time_limit_is_used_for_further_reads_and_a_number_of_rounds_is_kept(name):
    pytest.importorskip("openjij" if name == "openjij" else "dwave.samplers")
    problem = layered_problem(14, bits=(2, 4, 8), rank=2)
    usual = solve(problem, name, seed=0, presolve=False)
    longer = solve(problem, name, seed=0, presolve=False, time_limit=1.5)
    assert longer.details["rounds"] > usual.details["rounds"]
    assert longer.objective <= usual.objective
    assert longer.stop_reason == "TIME_LIMIT"
    assert solve(problem, name, seed=0, presolve=False, time_limit=60, rounds=2).details["rounds"] == 2


@pytest.mark.parametrize("name", ["sa", "sqa", "steepest-descent", "bifurcation", "openjij"])
def test_no_more_is_sampled_than_listing_all_choices_would_take(name):
    pytest.importorskip("openjij" if name == "openjij" else "dwave.samplers")
    problem = layered_problem(3, bits=(2, 4), rank=2)
    solution = solve(problem, name, seed=0, presolve=False, time_limit=1e4)
    assert solution.stop_reason == "COMPLETED"
    assert solution.details["samples"] >= 10 * 2**3
    assert solution.objective == pytest.approx(solve(problem, "brute-force").objective)


@pytest.mark.parametrize("name", ["sa", "sqa", "tabu", "steepest-descent", "bifurcation", "openjij"])
def test_a_generous_time_limit_changes_no_sample_of_a_number_of_rounds(name):
    pytest.importorskip("openjij" if name == "openjij" else "dwave.samplers")
    problem = layered_problem(10, rank=2)
    free, limited = (solve(problem, name, seed=3, rounds=3, time_limit=limit) for limit in (None, 600))
    assert limited.choice.tolist() == free.choice.tolist()
    told = ("samples", "distinct", "objective_raw", "objective_decoded", "objective_repaired", "prices")
    assert {key: limited.details[key] for key in told} == {key: free.details[key] for key in told}


def test_sa_stops_at_the_time_limit():
    solution = solve(layered_problem(150), "sa", seed=0, time_limit=0.5, num_sweeps=100_000)
    assert solution.stop_reason is StopReason.TIME_LIMIT


@pytest.mark.parametrize("name", ["sa", "sqa", "tabu", "steepest-descent", "bifurcation"])
def test_a_model_that_takes_too_long_to_build_is_not_begun(name, monkeypatch):
    def forbidden(problem):
        raise AssertionError("the whole model was built")

    problem = layered_problem(300, seed=3)
    monkeypatch.setattr("solvers.qubo.route.pair_couplings", forbidden)
    monkeypatch.setattr("solvers.qubo.route.CAUTION", 1e6)
    solution = solve(problem, name, seed=0, time_limit=1.0)
    assert solution.stop_reason is StopReason.TIME_LIMIT
    assert solution.feasible
    assert solution.details["samples"] == solution.details["rounds"] == 0
    assert solution.details["objective_raw"] is solution.details["objective_polished"] is None
    assert "s are left" in solution.details["not_sampled"]


def test_steepest_descent_searches_large_sparse_models_in_a_tree_for_the_same_samples(monkeypatch):
    """Searching a list takes a time that grows with the square of the size, which no time limit can end."""
    sampler, trees = dwave.samplers.SteepestDescentSampler, []
    sample = sampler.sample

    def spy(self, bqm, *, large_sparse_opt, **options):
        trees.append((bqm.num_variables, large_sparse_opt))
        return sample(self, bqm, large_sparse_opt=large_sparse_opt, **options)

    monkeypatch.setattr(sampler, "sample", spy)
    problem, options = layered_problem(1000, rank=0, bits=(2, 4, 8)), {"seed": 0, "rounds": 1, "num_reads": 3}
    by_tree = solve(problem, "steepest-descent", **options)
    monkeypatch.setattr("solvers.qubo.steepest_descent.TREE", np.inf)
    by_list = solve(problem, "steepest-descent", **options)
    assert trees[0][1]
    assert trees == [(trees[0][0], True), (trees[0][0], False)]
    assert by_tree.choice.tolist() == by_list.choice.tolist()
    assert by_tree.details["objective_decoded"] == by_list.details["objective_decoded"]


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_option_of_a_group_is_the_first_of_equal_ones(seed):
    drawn = small_problem(seed, max_groups=6, max_options=5)
    problem = drawn.derived(cost=np.random.default_rng(seed).integers(0, 3, drawn.num_options).astype(float))
    prices = dict.fromkeys(problem.budgets, 0.0)
    cost = np.split(problem.cost, problem.group_offsets[1:-1])
    assert _cheapest(problem, prices).tolist() == [int(np.argmin(costs)) for costs in cost]


def test_a_qubo_that_would_be_too_large_is_refused():
    with pytest.raises(UnsupportedProblemError, match=r"25,916,400 couplings, at most 20,000,000; use 'auto'"):
        solve(layered_problem(1200), "sa")
    with pytest.raises(UnsupportedProblemError, match="SteepestDescentSolver"):
        solve(layered_problem(1200), dwave.samplers.SteepestDescentSampler())


def test_tabu_refuses_a_model_whose_dense_matrix_would_fill_the_memory():
    problem = layered_problem(100_000, rank=0, bits=(4, 8))
    with pytest.raises(
        UnsupportedProblemError, match=r"up to 10,000 bits.* has 100,000 .*use 'auto', 'anneal' or 'sa'"
    ):
        solve(problem, "tabu", time_limit=1.0)
    with pytest.raises(UnsupportedProblemError, match="200,000 in encoding 'one-hot'"):
        solve(problem, "tabu", encoding="one-hot", time_limit=1.0)


def test_every_sample_is_counted_as_often_as_it_occurred(problem):
    class Twice(dimod.Sampler):
        parameters: ClassVar = {"num_reads": []}
        properties: ClassVar = {}

        def sample(self, bqm, **_):
            found = dwave.samplers.SteepestDescentSampler().sample(bqm, num_reads=3, seed=1)
            found.record.num_occurrences[:] = 2
            return found

    assert solve(problem, Twice(), rounds=2).details["samples"] == 12


def test_invalid_samples_of_a_cqm_sampler_are_counted_as_invalid():
    class Nothing:
        parameters: ClassVar = {}

        def sample_cqm(self, cqm, **_):
            states = [dict.fromkeys(cqm.variables, 0), dict.fromkeys(cqm.variables, 1)]
            return dimod.SampleSet.from_samples(states, "BINARY", [0.0, 1.0])

    problem = layered_problem(4, bits=(2, 4, 8), seed=1)
    solution = solve(problem, Nothing(), seed=0)
    assert solution.feasible  # repaired and polished
    assert (solution.details["samples"], solution.details["share_valid"]) == (2, 0.0)
    assert solution.details["objective_raw"] is None


class Answers(dimod.Sampler):
    """A sampler whose calls are answered in turn by what is given: a function of the model, or an error to raise."""

    parameters: ClassVar = {}
    properties: ClassVar = {}

    def __init__(self, *answers):
        self.answers = list(answers)

    def sample(self, bqm, **_):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(bqm)

    def sample_ising(self, *_, **__):
        raise NotImplementedError


def descended(bqm):
    return dwave.samplers.SteepestDescentSampler().sample(bqm, num_reads=3, seed=1)


def nothing(bqm):
    return dimod.SampleSet.from_samples(([], list(bqm.variables)), energy=[], vartype=bqm.vartype)


def test_a_sampler_without_samples_is_named_as_the_failure(problem):
    with pytest.raises(SolverError, match="solver 'Answers' failed before it found a choice: .* no samples"):
        solve(problem, Answers(nothing), rounds=2)


def test_an_empty_round_is_passed_over(problem):
    solution = solve(problem, Answers(nothing, descended), rounds=3)
    assert solution.stop_reason is StopReason.COMPLETED
    assert solution.details["samples"] == 6


@pytest.mark.parametrize("presolve", [False, True])
@pytest.mark.parametrize(
    "answer", [RuntimeError("no network"), lambda _: None, lambda _: descended(dimod.BQM("BINARY"))]
)
def test_a_sampler_that_fails_later_keeps_the_best_so_far(problem, answer, presolve):
    solution = solve(problem, Answers(descended, descended, answer), rounds=5, presolve=presolve)
    assert solution.stop_reason is StopReason.ERROR_RECOVERED
    assert solution.feasible
    assert solution.details["error"]
    wrapped = solve(problem, Polish(Answers(descended, descended, answer)), seed=0)
    assert wrapped.stop_reason is StopReason.ERROR_RECOVERED
    assert wrapped.objective <= solution.objective


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RuntimeError("no network"), "RuntimeError: no network"),
        (lambda _: None, "a sampler must return a dimod.SampleSet, found NoneType"),
        (
            lambda _: descended(dimod.BQM({0: 1.0}, {}, 0.0, "BINARY")),
            "lacks .* variables, the first of them 1",
        ),
    ],
)
def test_a_sampler_that_fails_at_once_is_an_error_that_says_how(problem, answer, said):
    with pytest.raises(SolverError, match=said):
        solve(problem, Answers(answer))


def test_spins_are_read_as_spins(problem):
    def spins(bqm):
        found = descended(bqm)
        return found.change_vartype("SPIN", inplace=False)

    bits, turned = (solve(problem, Answers(answer), seed=0, rounds=1) for answer in (descended, spins))
    assert turned.details == bits.details
    assert turned.details["share_valid"] > 0


def test_a_cqm_sampler_that_fails_or_returns_nothing_says_so():
    class Failing:
        parameters: ClassVar = {}

        def __init__(self, answer):
            self.answer = answer

        def sample_cqm(self, cqm, **_):
            return self.answer(cqm)

    problem = layered_problem(4, bits=(2, 4, 8), seed=1)
    with pytest.raises(SolverError, match="no samples"):
        solve(
            problem, Failing(lambda cqm: dimod.SampleSet.from_samples(([], list(cqm.variables)), "BINARY", energy=[]))
        )
    known = solve(problem, Failing(lambda _: 1 / 0), initial=[2, 0, 0, 0])
    assert known.stop_reason is StopReason.ERROR_RECOVERED
    assert known.choice.tolist() == [2, 0, 0, 0]


def test_beta_range_rises():
    hot, cold = beta_range(to_bqm(layered_problem(5), prices={"bytes": 1e-6}))
    assert 0 < hot < cold


def cut_problem(num_nodes, weight=1.0, seed=0):
    """Most edges of a random graph to cut: no costs, pair terms only."""
    rng = np.random.default_rng(seed)
    i, j = np.nonzero(np.triu(rng.random((num_nodes, num_nodes)) < 0.1, 1))
    rows, columns = np.concatenate([2 * i, 2 * i + 1]), np.concatenate([2 * j, 2 * j + 1])
    sides = scipy.sparse.csr_array((np.full(len(rows), weight), (rows, columns)), shape=(2 * num_nodes, 2 * num_nodes))
    names = [f"node{node}" for node in range(num_nodes)]
    return Problem(names, [["left", "right"]] * num_nodes, np.zeros(2 * num_nodes), {}, {}, PairTerms(sparse=sides))


def test_temperatures_follow_pair_terms():
    ranges = [np.array(beta_range(to_bqm(cut_problem(60, weight), "domain-wall"))) for weight in (1.0, 1000.0)]
    assert ranges[0] == pytest.approx(1000.0 * ranges[1])
    hot, cold = ranges[0]
    assert hot < 1.0  # some six edges a node: at the first temperature any node changes sides
    assert 1.0 < cold < 10.0  # one edge more or less is told apart at the last one


@pytest.mark.parametrize("name", ["sa", "openjij"])
def test_annealing_alone_comes_near_the_best_cut(name):
    if name == "openjij":
        pytest.importorskip("openjij")
    problem = cut_problem(150)
    best = solve(problem, Anneal(), seed=0).objective
    details = solve(problem, name, seed=0, rounds=1).details
    assert details["objective_decoded"] <= best + 4.0  # edges, of some thousand


@pytest.mark.parametrize(
    ("sampler", "parameters"),
    [
        (dwave.samplers.TabuSampler(), {"num_reads": 2, "timeout": 20}),
        (dwave.samplers.PathIntegralAnnealingSampler(), {"num_reads": 5, "num_sweeps": 50}),
        (dwave.samplers.SteepestDescentSampler(), None),
        (dimod.TruncateComposite(dwave.samplers.SteepestDescentSampler(), 3), {"num_reads": 5}),
    ],
    ids=["tabu", "sqa", "descent", "composite"],
)
def test_any_bqm_sampler_is_a_solver(problem, best, sampler, parameters):
    solution = solve(problem, sampler, seed=0, parameters=parameters, rounds=3)
    assert solution.solver == type(sampler).__name__
    assert solution.objective <= 1.5 * best


def test_a_cqm_sampler_gets_the_constraints_as_they_are():
    problem = layered_problem(4, bits=(2, 4, 8), seed=1)
    solution = solve(problem, dimod.ExactCQMSolver(), seed=0)
    assert solution.objective == pytest.approx(solve(problem, "brute-force").objective)
    assert solution.details["share_valid"] == 1


@pytest.mark.parametrize("thing", [object(), 3, dimod.ExactSolver])
def test_what_is_no_sampler_is_refused(thing):
    with pytest.raises(InvalidOptionError, match="sampler"):
        from_sampler(thing)


def test_parameters_that_the_sampler_lacks_are_refused(problem):
    with pytest.raises(InvalidOptionError, match=r"no parameter chain_strength.*num_reads"):
        solve(problem, dwave.samplers.TabuSampler(), parameters={"chain_strength": 2})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sa", "rounds", 0),
        ("sa", "num_reads", 0),
        ("sa", "encoding", "unary"),
        ("tabu", "num_restarts", -1),
        ("tabu", "encoding", "unary"),
        ("steepest-descent", "num_reads", 0),
        ("bifurcation", "num_steps", 0),
        ("bifurcation", "dynamics", "thermal"),
        ("openjij", "algorithm", "gpu"),
        (dwave.samplers.SteepestDescentSampler(), "rounds", 0),
        (dwave.samplers.SteepestDescentSampler(), "encoding", "unary"),
    ],
)
def test_impossible_options_are_refused(problem, name, option, value):
    with pytest.raises(InvalidOptionError, match=option):
        solve(problem, name, **{option: value})
