"""Groups of convolutions go with their channels: in one cut or in several, before codes are fitted, and in files."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress import fit_in_turn_, formulate, measure, prune_channels, prune_quantize
from qcompress.compressed.cutting import cut_, together
from qcompress.compressed.removal import mask_, remove_
from qcompress.structure.find import find_sets
from solvers import judge

KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def images(seed: int = 0) -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def around(middle: type[nn.Module], channels: int, outputs: int, groups: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        grouped = middle(channels, outputs, 2, stride=2, groups=groups)  # type: ignore[call-arg]
        return nn.Sequential(
            nn.Conv2d(3, channels, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(outputs, 3, 1), nn.Flatten()
        ).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_cut_of_two_cuts_leaves_the_groups_that_both_leave(kind: type[nn.Module], outputs: int) -> None:
    layer = kind(8, 4 * outputs, 1, groups=4)  # type: ignore[call-arg]
    whole, turned = copy.deepcopy(layer), isinstance(layer, nn.modules.conv._ConvTransposeNd)
    one_input_each = {("weight", 0): [1, 3, 5, 7]} if turned else {("weight", 1): [1]}
    cut_(layer, one_input_each)
    assert (layer.groups, layer.in_channels, layer.out_channels) == (4, 4, 4 * outputs)
    rows = [1] if turned else list(range(outputs, 2 * outputs))
    second = {("weight", 0): rows, ("bias", 0): list(range(outputs, 2 * outputs))}
    cut_(layer, second)
    cut_(whole, together(one_input_each, second, layer))
    assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 3, 3 * outputs)
    assert (whole.groups, whole.in_channels, whole.out_channels) == (3, 3, 3 * outputs)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_file_of_a_network_that_was_cut_twice_runs(kind: type[nn.Module], tmp_path: Path) -> None:
    model, data = around(kind, 16, 16, 8), [images(0), images(1)]
    for _ in range(2):
        measurement = measure(model, data, prune_channels(keep=(0.5,)), loss="mse")
        problem = formulate(measurement, {"macs": 1.0})
        model = qcompress.apply(model, measurement, judge(problem, [1] * problem.num_groups))
    assert model[2].groups == 4
    path = qcompress.save_compressed(model, tmp_path / "twice.st").path
    loaded = qcompress.load_compressed(path, lambda: around(kind, 16, 16, 8))
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("multiple", [1, 3])
def test_channels_go_through_a_depthwise_convolution_of_either_kind(kind: type[nn.Module], multiple: int) -> None:
    model = around(kind, 4, 4 * multiple, 4)
    structure = find_sets(model, [images()])
    assert [(item.name, item.num_units) for item in structure.sets] == [("0", 4)]
    assert structure.kept == {"4": "it reaches the output"}
    masked, smaller = (
        change(copy.deepcopy(model), structure.sets, {"0": [1, 2]})(images()) for change in (mask_, remove_)
    )
    torch.testing.assert_close(smaller, masked)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [4, 2])
def test_codes_and_fits_are_those_of_the_groups_that_stay(kind: type[nn.Module], groups: int) -> None:
    model, data = around(kind, 4, 8, groups), [images(0), images(1)]
    codes = prune_quantize(bits=(4,), sparsity=(0,), compensated=True)
    measurement = measure(model, data, prune_channels(keep=(0.25, 0.5)) + codes, loss="mse")
    problem = formulate(measurement, {"macs": 1.0, "bytes": 1.0})
    solution = judge(problem, [len(options) - 1 for options in problem.options])
    smaller = qcompress.apply(model, measurement, solution)
    assert qcompress.compressed_size(smaller).payload_bytes == solution.usage["bytes"]
    plain = measure(model, data, prune_channels(keep=(0.25, 0.5)), loss="mse")
    problem = formulate(plain, {"macs": 1.0})
    cut = qcompress.apply(model, plain, judge(problem, [1] * problem.num_groups))
    before = qcompress.mean_loss(model, cut, data, loss="mse")
    assert qcompress.mean_loss(model, fit_in_turn_(cut, model, data), data, loss="mse") <= before
