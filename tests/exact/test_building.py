"""Building a model for an exact solver ends with the time: it is not begun, or not continued, without enough of it."""

import importlib
import itertools

import highspy
import numpy as np
import pulp
import pytest
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.forms.integer_program import to_integer_program
from formulations.generators.random_instances import layered_problem
from formulations.reductions.restriction import restrict
from solvers.bounds.duality import dual_bound
from solvers.exact import milp
from solvers.exact.base import OutOfTimeError
from solvers.exact.cp_sat import CpSat
from solvers.exact.milp import Milp
from solvers.exact.miqp import Miqp
from solvers.search import Search
from solvers.testing import optimum
from solvers.testing.cut_runs import cut_run


def whole(problem, _):
    """Take the place of `undecided`: every option stays open."""
    return restrict(problem, np.ones(problem.num_options, dtype=bool))


def with_budgets():
    rng = np.random.default_rng(0)
    uses = {name: 1 + rng.random(24) for name in "ab"}
    return Problem([f"g{i}" for i in range(8)], [["x", "y", "z"]] * 8, rng.random(24), uses, dict.fromkeys("ab", 12.0))


RATES = {
    "milp": ("SECONDS_PER_VARIABLE", "SECONDS_PER_USE"),
    "miqp": ("SECONDS_PER_OPTION", "SECONDS_PER_TERM"),
    "cp_sat": ("SECONDS_PER_VARIABLE", "SECONDS_PER_USE"),
}


@pytest.mark.parametrize("solver", [Milp(), Milp(backend="cbc"), Miqp(), CpSat()], ids=lambda solver: solver.label)
@pytest.mark.parametrize(("rates", "needed"), [((1.0, 0.0), 24.0), ((0.0, 1.0), 48.0), ((1.0, 1.0), 72.0)])
def test_a_model_is_begun_only_if_building_it_can_end_in_time(solver, rates, needed, monkeypatch):
    if why := solver.why_not():
        pytest.skip(why)
    name = type(solver).__module__.rpartition(".")[2]
    module = importlib.import_module(type(solver).__module__)
    for rate, seconds in zip(RATES[name], rates, strict=True):
        monkeypatch.setattr(module, rate, seconds)
    monkeypatch.setattr(module, "undecided", whole)
    problem = with_budgets()
    for limit, begun in ((needed - 0.5, False), (needed + 0.5, True)):
        search = Search(problem, solver=solver.name, time_limit=limit, clock=lambda: 0.0)
        solver.run(problem, search)
        stopped = search.details.get("stopped")
        assert stopped == (None if begun else "building the model would take longer than the time limit")
        assert search.proven() == begun
        assert search.cut != begun


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_a_model_is_passed_on_only_if_that_can_end_in_time(backend, monkeypatch):
    now = [0.0]

    def slow(problem):
        now[0] += 40.0
        return to_integer_program(problem)

    monkeypatch.setattr(milp, "SECONDS_PER_VARIABLE", 1.0)
    monkeypatch.setattr(milp, "SECONDS_PER_USE", 1.0)
    monkeypatch.setattr(milp, "undecided", whole)
    monkeypatch.setattr(milp, "to_integer_program", slow)
    for limit, passed in ((75.0, False), (77.0, True)):  # 72 to build and pass on, 36 of them to pass on
        now[0] = 0.0
        search = Search(with_budgets(), solver="milp", time_limit=limit, clock=lambda: now[0])
        Milp(backend=backend).run(with_budgets(), search)
        assert search.proven() == passed
        assert ("would take longer" in search.details.get("stopped", "")) != passed


@pytest.mark.parametrize(("pairs", "looks"), [(False, 8), (True, 28)])
@pytest.mark.parametrize("name", ["miqp", "cp_sat"])
def test_the_clock_is_looked_at_for_every_group_and_block_that_is_built(name, pairs, looks, monkeypatch):
    pytest.importorskip({"miqp": "pyscipopt", "cp_sat": "ortools"}[name])
    module = importlib.import_module(f"solvers.exact.{name}")
    problem = with_budgets()
    if pairs:
        apart = np.triu(problem.group_of[:, None] != problem.group_of, 1)
        problem = problem.derived(pairs=PairTerms(sparse=scipy.sparse.csr_array(apart * 1.0)))
    monkeypatch.setattr("solvers.exact.miqp.SECONDS_PER_OPTION", 0.0)
    clock = itertools.count()
    search = Search(problem, solver=name, time_limit=looks, clock=lambda: float(next(clock)))
    arguments = (dual_bound(problem), 1.0, search) if name == "miqp" else (None, search)
    with pytest.raises(OutOfTimeError, match="took longer"):
        module._Program(problem, *arguments)


@pytest.mark.parametrize("solver", [Miqp(), CpSat()])
def test_a_model_is_not_built_to_the_end_when_the_time_is_over(solver, monkeypatch):
    if why := solver.why_not():
        pytest.skip(why)
    for rate in ("miqp.SECONDS_PER_OPTION", "cp_sat.SECONDS_PER_VARIABLE"):
        monkeypatch.setattr(f"solvers.exact.{rate}", 0.0)
    rng = np.random.default_rng(0)
    count = 40
    apart = np.triu(np.repeat(np.arange(count), 2)[:, None] != np.repeat(np.arange(count), 2)[None, :], 1)
    pairs = PairTerms(sparse=scipy.sparse.csr_array(apart * rng.normal(size=apart.shape)))
    problem = Problem([f"g{i}" for i in range(count)], [["x", "y"]] * count, [0.0] * 2 * count, {}, {}, pairs)
    stopped = [cut_run(problem, solver, looks).details.get("stopped", "") for looks in range(10, 400, 10)]
    assert any("building the model took longer" in reason for reason in stopped), stopped


@pytest.mark.parametrize(("limit", "left"), [(10.0, 3.0), (5.0, None)])
def test_highs_gets_the_time_that_is_left_after_building(limit, left, monkeypatch):
    now, given = [0.0], []
    build = pulp.HiGHS.buildSolverModel

    def slow(self, model):
        build(self, model)
        now[0] += 7.0

    def run_highs(highs):
        given.append(highs.getOptionValue("time_limit")[1])
        assert set(highs.getLp().integrality_) == {highspy.HighsVarType.kInteger}
        highs.run()

    monkeypatch.setattr(pulp.HiGHS, "buildSolverModel", slow)
    monkeypatch.setattr(milp, "_run_until_stopped", run_highs)
    problem = layered_problem(4, rank=0)
    search = Search(problem, solver="milp", time_limit=limit, clock=lambda: now[0])
    found = milp._highs(to_integer_program(problem), search, warm=False)
    assert given == ([] if left is None else [left])
    assert found.complete == (left is not None)
    assert found.choice is None or problem.evaluate(found.choice).objective == pytest.approx(optimum(problem))
