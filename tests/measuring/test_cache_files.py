"""Cache files of models in memory: a path that is no place for a file is told before anything runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompress import finetune, formulate, measure, prune_channels, prune_quantize, refine, remeasure
from qcompress.errors import DataError
from solvers import solve

OPTIONS = prune_quantize(bits=(2, 8), sparsity=(0,))


def call(name: str, cache: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    data = [torch.randn(8, 4)]
    if name == "measure":
        return measure(model, data, OPTIONS, cache=cache)
    if name == "channels":
        return measure(model, data, prune_channels(), cache=cache)
    if name == "finetune":
        return finetune(model, data, 2, teacher=model, cache=cache)
    measurement = measure(model, data, OPTIONS)
    problem = formulate(measurement, {"bytes": 0.5})
    choice = solve(problem, "greedy").choice
    if name == "remeasure":
        return remeasure(model, data, measurement, choice, cache=cache)
    return refine(model, data, measurement, problem, choice, rounds=1, cache=cache)


@pytest.mark.parametrize("name", ["measure", "channels", "finetune", "remeasure", "refine"])
def test_a_cache_that_cannot_be_a_file_is_told_first(name: str, tmp_path: Path) -> None:
    for folder in ("", tmp_path):
        with pytest.raises(DataError, match="the cache of a model in memory is a file, and '.*' is a folder"):
            call(name, folder)
    with pytest.raises(DataError, match="there is no folder '.*missing' for the cache sums"):
        call(name, tmp_path / "missing" / "sums")
    assert not list(tmp_path.iterdir())
    call(name, str(tmp_path / "sums"))
