"""Everything that takes a problem says so if it is given something else, such as a path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qcompress import measure, pool, prune_quantize, refine, solve, sweep
from solvers.beam import beam_search
from solvers.errors import InvalidOptionError
from solvers.multi_objective import pareto_front
from solvers.smallest_use import smallest_use


def refined(problem: Any) -> Any:
    model, data = nn.Sequential(nn.Linear(4, 3)), [torch.ones(4, 4)]
    measurement = measure(model, data, prune_quantize(bits=(2, 4), sparsity=(0,)))
    return refine(model, data, measurement, problem, [0])


TAKERS: dict[str, Callable[[Any], Any]] = {
    "solve": solve,
    "sweep": lambda problem: sweep(problem, "bytes"),
    "pool": lambda problem: pool(problem, 2),
    "smallest_use": lambda problem: smallest_use(problem, "bytes", 1.0),
    "beam_search": lambda problem: beam_search(problem, lambda _: 0.0),
    "pareto_front": lambda problem: pareto_front(problem, "bytes"),
    "refine": refined,
}


@pytest.mark.parametrize("taker", TAKERS)
def test_something_else_than_a_problem_is_refused_by_name(taker: str) -> None:
    with pytest.raises(InvalidOptionError, match=f"{taker} takes a formulations.Problem, found str; Problem.load"):
        TAKERS[taker]("problem.npz")
