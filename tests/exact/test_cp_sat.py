"""CP-SAT in whole numbers: what rounding can do is accounted for, whatever the numbers are."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import Problem
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.restriction import restrict
from solvers import InvalidOptionError, Status, StopReason, UnsupportedProblemError, run
from solvers.base import Search
from solvers.testing import optimum
from tests.quick import slow_but

pytest.importorskip("ortools")
cp_sat = pytest.importorskip("solvers.exact.cp_sat")

solve = partial(run.solve, presolve=False)  # the back end itself is tested


def whole_objective(program, choice):
    """What the program's objective and products give for a choice, by CP-SAT itself."""
    from ortools.sat.python import cp_model

    for group, option in enumerate(choice):
        program.model.add(program.x[program.first[group] + option] == 1)
    solver = cp_model.CpSolver()
    status = solver.solve(program.model)
    return solver.objective_value if status == cp_model.OPTIMAL else None


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.sampled_from([6, 20, 50]))
def test_a_choice_costs_in_whole_numbers_what_it_costs_up_to_the_stated_error(seed, bits):
    problem = small_problem(seed, max_groups=4, max_options=3)
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, np.diff(problem.group_offsets))
    judged = problem.evaluate(choice)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cp_sat, "OBJECTIVE_BITS", bits)
        program = cp_sat._Program(problem, None, Search(problem, solver="cp-sat"))
        found = whole_objective(program, choice)
    if judged.feasible:  # rounding never excludes it
        assert found is not None
        exact = program.shift + found / program.scale
        assert abs(exact - judged.objective) <= program.error + 1e-12 * program.size
        assert program.bound(found) <= judged.objective + 1e-12 * program.size


@pytest.mark.parametrize("bits", slow_but([8], [8, 50]))
def test_coarse_numbers_give_a_lower_bound_and_never_a_wrong_proof(bits, monkeypatch):
    monkeypatch.setattr(cp_sat, "OBJECTIVE_BITS", bits)
    for seed in range(40):
        problem = small_problem(seed, max_groups=5, max_options=3)
        try:
            best = optimum(problem)
            solution = solve(problem, "cp-sat", seed=0)
        except ValueError:  # a budget out of reach
            continue
        if best is None:
            assert solution.status is Status.INFEASIBLE
            continue
        assert solution.bound <= best + 1e-9 * (1 + abs(best))
        if solution.status is Status.OPTIMAL:
            assert solution.objective == pytest.approx(best, abs=1e-9)


def test_a_choice_that_only_fits_after_rounding_is_cut_off(monkeypatch):
    """In steps of one half, 0.9 and 0.6 are the same."""
    monkeypatch.setattr(cp_sat, "USE_BITS", 1)
    monkeypatch.setattr(cp_sat, "undecided", lambda problem, search: restrict(problem, np.ones(6, dtype=bool)))
    problem = Problem(["a", "b"], [["x", "y", "z"]] * 2, [0, 1, 2, 0, 1.5, 2], {"s": [0.9, 0.6, 0.1] * 2}, {"s": 1.05})
    solution = solve(problem, "cp-sat")
    assert solution.details["cuts"] >= 1
    assert solution.status is Status.OPTIMAL
    assert solution.objective == optimum(problem)


def test_sparse_pairs_are_proven_optimal():
    problem = layered_problem(30, degree=4, seed=2)
    solution, reference = solve(problem, "cp-sat", seed=0), solve(problem, "milp")
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(reference.objective, rel=1e-9)
    assert solution.details["workers"] == 1


def test_several_workers_may_race_but_prove_the_same():
    problem = layered_problem(12, seed=4)
    assert solve(problem, "cp-sat", workers=2).objective == pytest.approx(solve(problem, "cp-sat").objective)


def test_an_interrupt_while_cp_sat_runs_keeps_the_best_and_ends_its_thread():
    """SIGINT comes to the caller's thread while CP-SAT is in its own."""
    code = """
import os, signal, threading
from formulations.generators.random_instances import layered_problem
import solvers.exact.cp_sat as module
from solvers import solve
started = module._Program.solved
def solved(self, *arguments):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    yield from started(self, *arguments)
module._Program.solved = solved
solution = solve(layered_problem(60, seed=1), "cp-sat", seed=0)
assert not [t for t in threading.enumerate() if t.name == "cp-sat"]
print(solution.stop_reason, solution.feasible)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == [str(StopReason.INTERRUPTED), "True"], run.stderr


def test_too_many_products_are_refused_with_what_takes_them():
    with pytest.raises(UnsupportedProblemError, match="use 'auto', 'lagrangian' or 'anneal'"):
        solve(layered_problem(300), "cp-sat")


def test_no_workers_are_refused():
    with pytest.raises(InvalidOptionError, match="workers"):
        solve(layered_problem(3), "cp-sat", workers=0)


@pytest.mark.parametrize(
    "order",
    [pytest.param(("pulp", "highspy", "pyscipopt", "ortools"), marks=pytest.mark.slow),
     ("ortools", "pyscipopt", "highspy")],
)  # fmt: skip
def test_it_shares_a_process_with_the_other_exact_solvers(order):
    """From highspy 1.15 on it and ortools cannot be loaded together; what is pinned here can, in any order."""
    for module in order:
        pytest.importorskip(module)
    code = f"""
for name in {order!r}:
    __import__("ortools.sat.python.cp_model" if name == "ortools" else name)
from formulations.generators.random_instances import layered_problem
from solvers import solve
print({{round(solve(layered_problem(6, seed=1), name).objective, 9) for name in ("milp", "miqp", "cp-sat")}})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(",") == 0
