"""Calls under autocast and in inference mode give what calls outside of them give."""

import contextlib
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qcompress import (
    Measurement,
    apply,
    apply_,
    compress,
    finetune,
    fold_batch_norms,
    formulate,
    load_compressed,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
    refine,
    remeasure,
    save_compressed,
    solve,
)
from qcompress.errors import AutocastWarning, ModelError
from tests.measuring.methods.test_evidence import inputs

OPTIONS = prune_quantize(bits=(3, 8), sparsity=(0, 0.5), compensated=True) + low_rank()
DATA = [inputs(32, 12), inputs(32, 12, seed=2)]
autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)).eval()


def steps(path: Path) -> dict[str, Callable[[], Any]]:
    """Everything that measures or makes weights, by name."""
    model, fresh, data = network(), [network(), network()], DATA
    measurement = measure(model, data, OPTIONS)
    problem = formulate(measurement, {"bytes": 0.5})
    solution = solve(problem, "brute-force")
    save_compressed(apply(model, measurement, solution), path)
    return {
        "apply": lambda: apply(model, measurement, solution),
        "apply_": lambda: apply_(fresh.pop(), measurement, solution),
        "compress": lambda: compress(model, data, budget={"bytes": 0.5}, options=OPTIONS).model,
        "finetune": lambda: finetune(apply(model, measurement, solution), data, 2, teacher=model),
        "fold_batch_norms": lambda: fold_batch_norms(model, data[0]),
        "load_compressed": lambda: load_compressed(path, network),
        "refine": lambda: refine(model, data, measurement, problem, solution.choice, rounds=1).choice,
        "remeasure": lambda: remeasure(model, data, measurement, solution.choice).cost,
        **{f"measure {kind}": partial(measured, model, method=kind) for kind in ("fisher", "direct", "sampled")},
    }


def measured(model: nn.Module, **named: Any) -> np.ndarray:
    return measure(model, DATA, OPTIONS, **named).cost


def numbers(found: Any) -> list[np.ndarray]:
    if isinstance(found, nn.Module):
        assert not any(tensor.is_inference() for tensor in (*found.parameters(), *found.buffers()))
        return [tensor.detach().numpy() for tensor in found.state_dict().values()]
    return [np.asarray(found)]


@pytest.mark.parametrize("mode", [autocast, torch.inference_mode])
def test_the_callers_modes_change_no_number(mode: Callable[[], Any], tmp_path: Path) -> None:
    told = mode is autocast
    for name, step in steps(tmp_path / "model.safetensors").items():
        expected = numbers(step())
        with mode(), pytest.warns(AutocastWarning, match="switched off") if told else contextlib.nullcontext():
            found = step()
        for left, right in zip(numbers(found), expected, strict=True):
            np.testing.assert_array_equal(left, right, err_msg=name)


def test_autocast_in_the_forward_reaches_the_model() -> None:
    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with autocast():
            output = model(batch)
        assert output.dtype == torch.bfloat16
        return output

    measurement: Measurement = measure(network(), DATA, OPTIONS, forward=forward)
    assert (measurement.cost >= 0).all()


def test_weights_made_in_inference_mode_are_refused_by_name_before_anything_runs() -> None:
    with torch.inference_mode():
        model = network()
    for call in (measure, partial(compress, budget={"bytes": 0.5})):
        with pytest.raises(ModelError, match=r"'0.weight' was made in inference mode.*copy\.deepcopy"):
            call(model, DATA, options=OPTIONS)  # type: ignore[operator]
    made = copy.deepcopy(model)
    assert mean_loss(network(), compress(made, DATA, budget={"bytes": 0.5}, options=OPTIONS).model, DATA) >= 0
