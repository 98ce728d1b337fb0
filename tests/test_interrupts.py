"""Ctrl-C inside compiled code ends a solver with the best choice so far; other system errors are errors."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from solvers import Solver, solve
from solvers.search import Search, StopReason


@dataclass(frozen=True)
class Cut(Solver):
    """Offers one choice, then fails as compiled code does."""

    name: ClassVar[str] = "cut"
    summary: ClassVar[str] = "one choice, then an error"

    interrupted: bool = True

    def run(self, problem: Problem, search: Search) -> None:
        search.offer(np.zeros(problem.num_groups, dtype=np.int64))
        cause = KeyboardInterrupt() if self.interrupted else None
        raise SystemError("returned a result with an exception set") from cause


def test_an_interrupt_inside_compiled_code_keeps_the_best_choice() -> None:
    problem = layered_problem(4, bits=(2, 4), rank=2, seed=0)
    problem = problem.with_budgets(**dict.fromkeys(problem.budgets, 1e12))
    found = solve(problem, Cut(), presolve=False)
    assert found.stop_reason == StopReason.INTERRUPTED
    assert found.choice is not None
    with pytest.raises(SystemError):
        solve(problem, Cut(interrupted=False), presolve=False)
