"""A model on a device that is not the CPU: measured there, compressed there, and nothing is mixed up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, tempfile, warnings
import numpy as np, torch
from tests import far_device
far_device.register()
from qcompress import apply, formulate, load_compressed, low_rank, measure, prune_quantize, save_compressed, solve
from qcompress.compressed.packed import pack_
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.forward import run
from tests.architectures import architecture

warnings.simplefilter("ignore")  # PyTorch's, of its attention
torch.set_num_threads(1)
torch.backends.mha.set_fastpath_enabled(False)  # tensors there cannot take it, and layers can be replaced only without
options = prune_quantize(bits=(4,), sparsity=(0, 0.5), compensated=True) + prune_quantize(bits=(4,), group_size=16)
options += low_rank(ratios=(0.3,))
name, method, dtype = sys.argv[1:]
own = architecture(name)
dtype = getattr(torch, dtype)
data = [batch.to(dtype) if batch.is_floating_point() else batch for batch in own.data]
near = measure(own.make().to(dtype), data, options, method=method)
with far_device.Device():
    make = lambda: own.make().to(dtype).to("far")
    data = [batch.to("far") for batch in data]
    model = make()
    assert {tensor.device.type for tensor in model.parameters()} == {"far"}
    far = measure(model, data, options, method=method)
    assert far.labels == near.labels, (far.labels, near.labels)
    assert far.tried.keys() == near.tried.keys()
    np.testing.assert_allclose(far.cost, near.cost, rtol=1e-3, atol=1e-4 * near.cost.max())  # other kernels round anew
    solution = solve(formulate(far, {"bytes": 0.3}), "greedy")
    smaller = apply(model, far, solution)
    assert {tensor.device.type for tensor in smaller.parameters()} == {"far"}
    assert np.isfinite(mean_loss(model, smaller, data))
    path = tempfile.mkdtemp() + "/model.safetensors"
    save_compressed(smaller, path)
    with torch.no_grad():
        expected = run(smaller, data[0])
        loaded = load_compressed(path, make)
        assert torch.equal(run(loaded, data[0]), expected)
        assert (run(pack_(loaded), data[0]) - expected).abs().max().item() < 0.05 * expected.abs().max().item()
"""

CHANNELS = """
import sys, warnings
import numpy as np, torch
from tests import far_device
far_device.register()
from qcompress import apply, measure, prune_channels, prune_quantize
from qcompress.formulation import formulate
from qcompress.measuring.recoded import fitted_in_turn
from qcompress.measuring.true_loss import mean_loss
from solvers import judge
from tests.architectures import architecture

warnings.simplefilter("ignore")  # PyTorch's, of its attention
torch.set_num_threads(1)
own = architecture(sys.argv[1])
options = prune_channels(keep=(0.5,)) + prune_quantize(bits=(4,), sparsity=(0,), compensated=True)

data = own.data[:1]

def halved(model, data):
    measurement = measure(model, data, options)
    problem = formulate(measurement, {"bytes": 1.0})
    solution = judge(problem, [len(names) - 1 for names in problem.options])
    smaller = apply(model, measurement, solution)
    transforms = [own[option] for own, option in zip(measurement.transforms, solution.choice)]
    fitted = fitted_in_turn(model, measurement, transforms, data)
    return measurement, fitted, [mean_loss(model, each, data) for each in (smaller, fitted)]

near, _, losses = halved(own.make(), data)
with far_device.Device():
    data = [batch.to("far") for batch in data]
    far, fitted, far_losses = halved(own.make().to("far"), data)
    assert {tensor.device.type for tensor in fitted.parameters()} == {"far"}
assert far.labels == near.labels, (far.labels, near.labels)
np.testing.assert_allclose(far.cost, near.cost, rtol=1e-3, atol=1e-4 * near.cost.max())  # other kernels round anew
np.testing.assert_allclose(far_losses, losses, rtol=0.05)  # codes of second moments that round differently
"""

REFUSED = """
import torch
from tests import far_device
far_device.register()
from qcompress.structure.rules import repeated
with far_device.Device():
    places = torch.tensor([3, 1]).to("far")
    assert repeated(torch.ops.aten.index.Tensor, torch.arange(5), ([places],), {}, []).tolist() == [3, 1]
    try:
        torch.arange(5)[places]
    except RuntimeError as error:
        print(error)
    layer = torch.nn.Linear(2, 2).to("far")
    assert layer(torch.ones(1, 2).to("far")).device.type == "far"
    layer(torch.ones(1, 2))
"""


def outcome(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_labels_are_picked_by_indices_on_the_second_device_which_refuses_tensors_of_the_first() -> None:
    run, message = outcome(REFUSED), "expected all tensors on one device, found far and cpu"
    assert message in run.stdout
    assert message in run.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobile", "attention"])
def test_channels_are_removed_and_layers_fitted_on_another_device(name: str) -> None:
    run = outcome(CHANNELS, name)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("mobile", "fisher", "float32"),
        pytest.param("attention", "sampled", "float32", marks=pytest.mark.slow),
        pytest.param("mobile", "sampled", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_model_on_another_device_is_compressed_there(name: str, method: str, dtype: str) -> None:
    run = outcome(PROGRAM, name, method, dtype)
    assert run.returncode == 0, run.stderr[-4000:]
