"""Predicted bytes and macs are those of the smaller network, whatever else multiplies beside attention and layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from qcompress import (
    apply,
    compress,
    compressed_size,
    formulate,
    measure,
    prune_channels,
    prune_quantize,
    save_compressed,
)
from qcompress.compressed.copying import own_copy
from qcompress.compressed.removal import remove_
from qcompress.model.composed import compose_
from qcompress.model.counting import count
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.uses import uses_of
from solvers import judge

WIDTH, POSITIONS = 16, 10


class Attention(nn.Module):
    """Four heads, as products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (own(x).unflatten(-1, (-1, 4)).transpose(1, 2) for own in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Parameters(nn.Module):
    """Products with plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(WIDTH, 64) / 4)
        self.d = nn.Parameter(torch.randn(64, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.u) @ self.d


class Functional(nn.Module):
    """A layer whose weight is also used outside of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(functional.linear(torch.relu(self.layer(x)), self.layer.weight)))


class OfOneParameter(nn.Module):
    """A convolution whose weight is a function of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(x.transpose(1, 2), self.w[:, :, None].tanh()).transpose(1, 2)


class OfTwoParameters(nn.Module):
    """A product and a convolution whose weights are computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.w * self.scale
        return functional.conv1d(x.transpose(1, 2), weight[:, :, None]).transpose(1, 2) @ weight


class Positions(nn.Module):
    """A layer and a parameter that mix positions: their work follows the channels, their size does not."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.w = nn.Linear(POSITIONS, POSITIONS), nn.Parameter(torch.randn(POSITIONS, POSITIONS) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ self.mix(x.transpose(1, 2)).transpose(1, 2)


class Recurrent(nn.Module):
    """A recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Own(nn.Module):
    """PyTorch's own attention, which uses the weight of its last layer directly."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Normed(nn.Module):
    """Layers whose weights are computed by parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight_norm(nn.Linear(WIDTH, 64)), weight_norm(nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """Attention, another branch, and layers around them."""

    def __init__(self, branch: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, WIDTH), Attention(), nn.Linear(WIDTH, 5)
        self.branch, self.mlp = branch(), nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x)
        return self.last(x + self.mlp(x + self.branch(x)))


BRANCHES = (Parameters, Functional, OfOneParameter, OfTwoParameters, Positions, Recurrent, Own, Normed)


def made(branch: type[nn.Module]) -> tuple[nn.Module, list[Tensor]]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Network(branch).eval(), [torch.randn(8, POSITIONS, 6) for _ in range(2)]


@pytest.mark.parametrize("branch", BRANCHES)
def test_bytes_and_macs_of_every_removal_are_those_of_the_smaller_network(branch: type[nn.Module]) -> None:
    (model, data), rng = made(branch), np.random.default_rng(0)
    sets = find_sets(model, data).sets
    compose_(model)
    uses = uses_of(model, sets, count(model, data, None))
    single = [[int(place == chosen) for place in range(len(sets))] for chosen in range(len(sets))]
    drawn = [[int(rng.integers(item.num_units)) for item in sets] for _ in range(4)]
    for numbers in (*single, *drawn):
        removed = {item.name: range(number) for item, number in zip(sets, numbers, strict=True)}
        smaller = remove_(own_copy(model), sets, removed)
        found = uses.of([item.num_units - number for item, number in zip(sets, numbers, strict=True)])
        assert found["bytes"] == total_bytes(smaller)
        assert found["macs"] == pytest.approx(count(smaller, data, None).macs, rel=1e-9)  # sums of floats


@pytest.mark.parametrize("branch", [Parameters, Normed])
def test_a_measurement_predicts_what_apply_gives(branch: type[nn.Module]) -> None:
    model, data = made(branch)
    measurement = measure(model, data, prune_channels(keep=(0.5, 0)), loss="mse")
    problem = formulate(measurement, {"macs": 1.0, "bytes": 1.0})
    for choice in ([0] * problem.num_groups, [1] * problem.num_groups):
        solution = judge(problem, np.array(choice))
        smaller = apply(model, measurement, solution)
        assert solution.usage["bytes"] == compressed_size(smaller).payload_bytes
        assert solution.usage["macs"] == pytest.approx(count(smaller, data, None).macs, rel=1e-9)


def test_a_budget_for_macs_holds_beside_products_with_parameters() -> None:
    model, data = made(Parameters)
    options: Any = prune_channels(keep=(0.75, 0.5, 0.25, 0))
    result = compress(model, data, budget={"macs": "60%"}, options=options, loss="mse", time_limit=2)
    used = count(result.model, data, None).macs
    assert used == pytest.approx(result.report.usage["macs"], rel=1e-9)
    assert used <= result.report.budgets["macs"]


class WithTable(nn.Module):
    """A table that is not stored with the state, whose columns are coupled channels or not."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 7)
        self.register_buffer("table", torch.randn(shape), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last((x * self.table if self.table.ndim == 4 else x).mean((2, 3)))


@pytest.mark.parametrize("shape", [(64,), (1, 8, 1, 1)])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("coded", [False, True])
def test_buffers_outside_the_state_are_counted_once(
    shape: tuple[int, ...], rounds: int, coded: bool, tmp_path: Path
) -> None:
    options = prune_channels(keep=(0.75, 0.5))
    if coded:
        options += prune_quantize(bits=(4, 8), sparsity=(0,))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, data = WithTable(*shape), [torch.randn(32, 3, 6, 6) for _ in range(2)]
    given: Any = {"budget": {"bytes": 0.65}, "options": options, "rounds": rounds, "time_limit": 2}
    result = compress(model, data, **given)
    saved = save_compressed(result.model, tmp_path / "smaller.st")
    assert result.report.usage["bytes"] == saved.payload_bytes <= result.report.budgets["bytes"]
    assert not [warning for warning in result.report.warnings if "smaller network takes" in warning]
