"""Solvers in words: names, options, import paths; what cannot be meant is refused in words."""

import dimod
import pytest

from formulations.generators.random_instances import layered_problem
from solvers import InvalidOptionError, UnknownSolverError, solve
from solvers.run import as_solver
from solvers.solver_text import options_of
from tests.compare.own_solvers import Dice, Downhill

OWN = "tests.compare.own_solvers"


def test_words_give_a_solver_its_options():
    solver = as_solver("anneal:sweeps=200")
    assert (solver.name, solver.sweeps) == ("anneal", 200)
    assert as_solver("dp").name == "dp"


def test_commas_and_colons_inside_values_belong_to_them():
    text = "beta_range=(0.1, 3),options={'a': 1, 'b': 2},backend=cbc,quiet=True"
    assert options_of(text) == {
        "beta_range": (0.1, 3), "options": {"a": 1, "b": 2}, "backend": "cbc", "quiet": True
    }  # fmt: skip


def test_an_import_path_leads_to_a_class_an_instance_or_a_function():
    assert as_solver(f"{OWN}:Dice") == Dice()
    assert as_solver(f"{OWN}:Dice:rolls=7") == Dice(rolls=7)
    assert isinstance(as_solver(f"{OWN}:Downhill").sampler, Downhill)
    assert as_solver(f"{OWN}:ONES").sampler.bit == 1
    assert isinstance(as_solver(f"{OWN}:truncated").sampler, dimod.TruncateComposite)
    assert as_solver(f"{OWN}:Exact").name == "Exact"


def test_what_a_sampler_takes_as_parameters_goes_there():
    solver = as_solver(f"{OWN}:Downhill:num_reads=3,rounds=2")
    assert (solver.rounds, solver.parameters) == (2, {"num_reads": 3})
    with pytest.raises(InvalidOptionError, match="has no parameter heat; it has: num_reads, depth"):
        as_solver(f"{OWN}:Downhill:heat=3")


def test_every_kind_of_object_solves():
    problem = layered_problem(3, bits=(2, 4), rank=0)
    for words in ("Dice:rolls=3", "Downhill:num_reads=2", "ONES", "truncated", "Exact"):
        assert solve(problem, f"{OWN}:{words}", seed=0).feasible


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("nowhere_to_be_found:Solver", UnknownSolverError, "no module is called 'nowhere_to_be_found'"),
        (f"{OWN}:Nobody", UnknownSolverError, "there is no 'Nobody'; there is .*Dice"),
        (f"{OWN}:NUMBER", InvalidOptionError, "found int"),
        ("anneal:fast", InvalidOptionError, "anneal:name=value"),
        ("anneal:fast=1", InvalidOptionError, "has no option 'fast'; it has: "),
        ("anneal:sweeps=1,sweeps=2", InvalidOptionError, "each once"),
        ("anneal:sweeps=", InvalidOptionError, "name=value"),
        ("an neal:sweeps=1", InvalidOptionError, "write a solver as"),
        ("nobody:sweeps=1", UnknownSolverError, "no solver is called 'nobody'"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, error, message):
    with pytest.raises(error, match=message):
        as_solver(words)
