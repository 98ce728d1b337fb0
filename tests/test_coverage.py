"""Nearly every byte of a model is a part, whatever its architecture; measured, applied, saved and loaded alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import apply, formulate, load_compressed, measure, prune_quantize, save_compressed, solve
from qcompress.compressed.packed import pack_
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.forward import default_forward, run
from tests.architectures import NAMES, Architecture, architecture
from tests.measurements import changed_copies
from tests.quick import slow_but

QUICK = ("mixtral", "bert", "whisper", "tagger", "mobile", "attention")
OPTIONS = prune_quantize(bits=(4,), sparsity=(0,), compensated=False)


def single_losses(model: nn.Module, measurement: Measurement, own: Architecture) -> np.ndarray:
    """True mean losses of every option alone, from copies of the model with its rows put in."""
    return np.array([mean_loss(model, changed, own.data) for changed in changed_copies(model, measurement)])


def few_outputs(model: nn.Module, batch: Any) -> Tensor:
    """The first outputs of every sample, so few that each is linearised by itself."""
    return default_forward(model, batch).flatten(1)[:, :6]


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's encoder layer speaks of its nested tensors
@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_nearly_all_bytes_are_parts_that_are_stored_as_predicted(name: str, tmp_path: Path) -> None:
    own = architecture(name)
    model = own.make()
    measurement = measure(model, own.data, OPTIONS, method="direct")
    assert measurement.fixed["bytes"] < 0.02 * measurement.original["bytes"], measurement.skipped
    np.testing.assert_allclose(measurement.cost, single_losses(model, measurement, own), rtol=1e-3, atol=1e-6)

    solution = solve(formulate(measurement, {"bytes": 0.2}), "greedy")
    smaller = apply(model, measurement, solution)
    saved = save_compressed(smaller, tmp_path / "model.safetensors")
    assert saved.payload_bytes == solution.usage["bytes"]
    loaded = load_compressed(saved.path, own.make)
    with torch.no_grad():
        expected = run(smaller, own.data[0])
        assert torch.equal(run(loaded, own.data[0]), expected)
        torch.testing.assert_close(run(pack_(loaded), own.data[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", slow_but(QUICK, NAMES))
def test_linearised_costs_are_those_of_trying(name: str) -> None:
    own = architecture(name)
    model = own.make()
    eight = prune_quantize(bits=(8,), sparsity=(0,))
    tried, linearised = (
        measure(model, own.data, eight, method=method, forward=few_outputs) for method in ("direct", "fisher")
    )
    # 8 bits change a weight by half a per cent: the second order tells a cost but for some per cent of the largest
    np.testing.assert_allclose(linearised.cost, tried.cost, rtol=0.2, atol=0.01 * tried.cost.max())
