"""The CQM of a problem has the problem's objective and violations."""

import io
import zipfile

import dimod
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, PairTerms, Problem, to_cqm
from formulations.forms.cqm_file import cqm_file
from formulations.generators.random_instances import layered_problem, small_problem


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


@pytest.mark.parametrize("seed", range(40))
def test_the_file_is_the_one_that_dimod_writes_of_the_model(seed):
    problem = small_problem(seed)
    with cqm_file(problem) as ours, to_cqm(problem).cqm.to_file() as theirs:
        written, reference = ours.read(), theirs.read()
    assert written[: written.index(b"PK")] == reference[: reference.index(b"PK")]
    ours, theirs = (zipfile.ZipFile(io.BytesIO(whole)) for whole in (written, reference))
    assert {name: ours.read(name) for name in ours.namelist()} == {
        name: theirs.read(name) for name in theirs.namelist()
    }


def test_the_model_is_the_one_that_dimod_builds_of_its_terms():
    """Objective by objective of the pairs one by one, through dimod's own arithmetic."""
    problem = layered_problem(6, bits=(2, 4, 8), rank=3, seed=5)
    couplings = {}
    for u in range(problem.num_options):
        for v in range(u):
            if problem.group_of[u] != problem.group_of[v]:
                couplings[u, v] = float(problem.pairs.factor[u] @ problem.pairs.factor[v])
    built = dimod.BinaryQuadraticModel(dict(enumerate(problem.cost)), couplings, problem.offset, dimod.BINARY)
    assert to_cqm(problem).cqm.objective.is_almost_equal(built, 12)


def test_any_name_of_a_group_survives_the_file():
    names = ["a/b", 'say "c"', "ä\n", "\\u002f"]
    problem = Problem(names, [["x", "y"]] * 4, range(8), {"bytes/s": range(8)}, {"bytes/s": 20}, PairTerms())
    with cqm_file(problem) as file:
        loaded = dimod.ConstrainedQuadraticModel.from_file(file)
    assert set(loaded.constraints) == {f"group {name}" for name in names} | {"budget bytes/s"}
    assert loaded.discrete == to_cqm(problem).cqm.discrete


def test_a_model_of_too_many_pairs_is_refused(monkeypatch):
    monkeypatch.setattr("formulations.forms.cqm.MAX_PAIRS", 10)
    with pytest.raises(EncodingError, match="more than 10; .*leap-nl"):
        to_cqm(layered_problem(3))
