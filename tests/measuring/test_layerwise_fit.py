"""Layers of every kind are fitted in turn, if they compute a product, and keep the spread that follows expects."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import apply, find_sets, fit_in_turn_, formulate, mean_loss, measure, prune_channels
from qcompress.measuring.layerwise_fit import _in_order
from qcompress.measuring.least_squares import LayerSums
from solvers import judge
from tests.models import seeded


class Padded(nn.Conv2d):
    """Pads by itself, as "same" padding of other frameworks does."""

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, 1, 1, 0))
        return nn.functional.conv2d(padded, self.weight, self.bias, self.stride)


class Doubled(nn.Conv2d):
    """Its output is no product with its weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def plane(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))


SEQUENCES, PICTURES, VOLUMES = (3, 9), (3, 7, 6), (3, 5, 4, 4)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: plane(nn.Conv1d(3, 12, 3), nn.ReLU(), nn.Conv1d(12, 8, 2, dilation=2)), SEQUENCES),
    "3d": (lambda: plane(nn.Conv3d(3, 12, 2), nn.ReLU(), nn.Conv3d(12, 8, 2)), VOLUMES),
    "transposed": (lambda: plane(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, stride=2)), PICTURES),
    "depthwise": (
        lambda: plane(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 8, 1)),
        PICTURES,
    ),
    "own padding": (lambda: plane(nn.Conv2d(3, 12, 3), nn.ReLU(), Padded(12, 8, 2, stride=2)), PICTURES),
    "half precision": (lambda: plane(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3)), PICTURES),
}  # fmt: skip


def drawn(shape: tuple[int, ...], samples: int, seed: int) -> Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))


def made(build: Callable[[], nn.Module], example: Tensor) -> nn.Module:
    model = seeded(build)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model(example)  # lazy layers get their sizes
    return model.eval()


def halved(model: nn.Module, data: list[Any]) -> nn.Module:
    """The network with half of every set of channels, and nothing made up for."""
    measurement = measure(model, data, prune_channels(keep=(0.5,), scores="l1", reconstructed=False), loss="mse")
    problem = formulate(measurement, {"bytes": 1.0})
    return apply(model, measurement, judge(problem, [1] * problem.num_groups))


@pytest.mark.parametrize("kind", NETWORKS)
def test_layers_of_every_kind_are_fitted(kind: str) -> None:
    build, shape = NETWORKS[kind]
    dtype = torch.bfloat16 if kind == "half precision" else torch.float32
    data, others = ([drawn(shape, 200, seed).to(dtype)] for seed in (0, 1))
    model = made(build, data[0][:2].float()).to(dtype)
    smaller = halved(model, data)
    layers = [path for path, module in smaller.named_modules() if hasattr(module, "weight")]
    assert _in_order(smaller, data, None) == layers
    before = [mean_loss(model, smaller, batches, loss="mse") for batches in (data, others)]
    weights = {path: smaller.get_submodule(path).weight.clone() for path in layers}
    fit_in_turn_(smaller, model, data)
    after = [mean_loss(model, smaller, batches, loss="mse") for batches in (data, others)]
    assert not torch.equal(smaller.get_submodule(layers[-2]).weight, weights[layers[-2]])
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.9 * before[1]


def test_transformers_linear_layers_are_fitted() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Conv1D(12, 16), nn.ReLU(), Conv1D(4, 12)))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(2)
        for layer in (model[2], model[4]):
            nn.init.normal_(layer.weight)
    data, others = ([drawn((6,), 400, seed)] for seed in (0, 1))
    smaller = halved(model, data)
    before = mean_loss(model, smaller, others, loss="mse")
    fit_in_turn_(smaller, model, data)
    assert mean_loss(model, smaller, others, loss="mse") < before


def test_a_layer_that_changes_its_product_is_left_alone() -> None:
    data = [drawn(PICTURES, 100, 0)]
    model = made(lambda: plane(nn.Conv2d(3, 12, 3), nn.ReLU(), Doubled(12, 8, 3)), data[0][:2])
    smaller = halved(model, data)
    before = smaller[2].weight.clone()
    fit_in_turn_(smaller, model, data)
    assert torch.equal(smaller[2].weight, before)
    assert not torch.equal(smaller[0].weight, model[0].weight[: len(smaller[0].weight)])


def test_the_number_of_batches_makes_no_difference() -> None:
    build, shape = NETWORKS["depthwise"]
    data = drawn(shape, 64, 0)
    model = made(build, data[:2])
    one, several = (fit_in_turn_(halved(model, [data]), model, list(data.split(size))) for size in (64, 16))
    for own, other in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)  # sums in float32 of 1,280 positions


def test_outputs_vary_by_the_geometric_mean_of_the_fit_and_what_is_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 500, 6, generator=generator, dtype=torch.float64) + 1.0
    goal = rows @ torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    goal += torch.randn(goal.shape, generator=generator, dtype=torch.float64)
    sums = LayerSums()
    for rows_part, goal_part in zip(rows.split(200, 1), goal.split(200, 1), strict=True):
        sums.add(rows_part, goal_part)
    weight = sums.ridge(torch.zeros(2, 3, 6, dtype=torch.float64), 1e-12)
    expected = torch.linalg.lstsq(rows, goal).solution.mT
    torch.testing.assert_close(weight, expected)
    fitted, widened = ((rows @ own.mT).std(1) for own in (weight, sums.widened(weight)))
    assert (fitted < goal.std(1)).all()
    torch.testing.assert_close(widened, (fitted * goal.std(1)).sqrt(), rtol=1e-4, atol=0.0)  # the share for rounding


def test_channels_that_do_not_vary_keep_their_scale() -> None:
    """One sample, or outputs that are the same for all: there is no spread to restore."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    for rows in (torch.randn(1, 1, 4, generator=generator), torch.ones(1, 50, 4) / 3):
        sums = LayerSums()
        sums.add(rows, (rows.double() @ weight.mT).float())
        torch.testing.assert_close(sums.widened(weight), weight, rtol=0.01, atol=0.0)  # sums in float32, fourth root


def test_sets_with_depthwise_layers_are_found_whole() -> None:
    data = [drawn(PICTURES, 4, 0)]
    model = made(NETWORKS["depthwise"][0], data[0][:2])
    assert {axis.tensor for axis in find_sets(model, data).sets[0].axes} >= {"0.weight", "2.weight", "4.weight"}
