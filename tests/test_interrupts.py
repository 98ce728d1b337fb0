"""Ctrl-C ends a solver with the best choice so far, also inside compiled code; no step of a run folder keeps that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from qcompress import compress, prune_quantize
from solvers import Solver, solve
from solvers.search import Progress, Search, StopReason


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


@pytest.mark.parametrize("asked", [{"budget": {"bytes": "30%"}}, {"budget": {"loss": 0.05}, "minimize": "bytes"}])
def test_the_same_call_ends_what_ctrl_c_cut_as_if_it_had_not(asked: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]
    told: list[Progress] = []

    def press(progress: Progress) -> None:
        if progress.objective is not None and not told:
            told.append(progress)
            raise KeyboardInterrupt

    def compressed(**settings: Any) -> tuple[str, str, list[int]]:
        options = prune_quantize(bits=(2, 4, 8), sparsity=(0,))
        result = compress(nn.Sequential(*layers), data, options=options, solver="brute-force", **asked, **settings)
        solution = result.solution
        return str(solution.status), str(solution.stop_reason), solution.choice.tolist()

    data = [torch.randn(32, 8)]
    whole = compressed()
    compressed(folder=tmp_path, on_progress=press)
    cut = "smallest.json" if "minimize" in asked else "solution.json"
    assert '"stop_reason": "INTERRUPTED"' in (tmp_path / cut).read_text()
    assert compressed(folder=tmp_path) == whole
    assert not list(tmp_path.glob("*.part"))
