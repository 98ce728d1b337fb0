"""Nothing is compiled, nor loaded from disk, while the clock of a run goes: back ends do that before."""

import subprocess
import sys
from pathlib import Path

import pytest

from solvers import available

ROOT = Path(__file__).parent.parent.parent
LOCAL = sorted(info.name for info in available() if not info.name.startswith(("leap", "qpu")))
QUICK = ("auto", "greedy")
SCRIPT = '''
import sys

import numpy as np
import scipy.sparse
from numba.core.dispatcher import Dispatcher

from formulations import PairTerms, Problem
from solvers import registry, solve
from solvers.run import as_solver

def problem(pairs, budgets, options, groups):
    """Budgets that the cheapest options exceed and that only some choices keep."""
    rng = np.random.default_rng(1)
    size, num_options = np.tile([9.0, 3.0, 1.0][:options], groups), options * groups
    cost = rng.random(num_options) * np.tile([0, 1, 2][:options], groups)
    uses = {f"use {k}": size + rng.permutation(size) * (k > 0) for k in range(budgets)}
    limits = {name: 1.4 * sum(use.reshape(groups, options).min(axis=1)) for name, use in uses.items()}
    half = np.triu(rng.normal(size=(num_options, num_options)), 1)
    group = np.arange(num_options) // options
    half[np.equal.outer(group, group)] = 0
    terms = {
        "none": None,
        "factor": PairTerms(factor=rng.normal(size=(num_options, 2))),
        "sparse": PairTerms(sparse=scipy.sparse.csr_array(half)),
    }
    names = [f"g{i}" for i in range(groups)]
    return Problem(names, [["a", "b", "c"][:options]] * groups, cost, uses, limits, terms[pairs])


def loaded():
    """Names of all kernels with the types that they are compiled for."""
    modules = [module for name, module in sys.modules.items() if name.startswith("solvers")]
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    return {(kernel.py_func.__qualname__, str(types)) for kernel in kernels for types in kernel.signatures}


back_end = registry.configured(as_solver(sys.argv[1]), {})
kinds = ("none", 3, 14), ("factor", 3, 14), ("sparse", 3, 14), ("sparse", 2, 22), ("factor", 2, 5)
for pairs, options, groups in kinds:
    for budgets in (0, 1, 2):
        instance = problem(pairs, budgets, options, groups)
        if back_end.refuse(instance):
            continue
        back_end.prepare()
        before = loaded()
        solve(instance, back_end, time_limit=0.2, seed=0)
        if late := loaded() - before:
            print(pairs, budgets, options, sorted({name for name, _ in late}))
'''


def late(solver: str) -> str:
    run = [sys.executable, "-c", SCRIPT, solver]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("solver", QUICK)
def test_nothing_is_compiled_within_the_time_of_a_run(solver: str) -> None:
    assert late(solver) == ""


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(set(LOCAL) - set(QUICK)))
def test_nothing_is_compiled_within_the_time_of_a_run_of_the_others(solver: str) -> None:
    assert late(solver) == ""
