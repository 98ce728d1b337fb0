"""A benchmark that cannot go on without a choice says which solver found none."""

import pytest

from benchmarks.found import found
from formulations import Problem
from solvers import judge, solve

PROBLEM = Problem(["layer"], [["keep", "4 bits"]], [0, 3], {"bytes": [8, 1]}, {"bytes": 4})


def test_the_choice_and_the_objective_of_a_solution_are_found():
    assert found(solve(PROBLEM, "brute-force")).choice.tolist() == [1]
    assert found(solve(PROBLEM, "brute-force")).objective == 3


def test_a_solution_without_a_choice_is_named_with_its_solver():
    with pytest.raises(RuntimeError, match="by hand found no choice within the budgets: UNKNOWN"):
        found(judge(PROBLEM, [0], name="by hand"))
