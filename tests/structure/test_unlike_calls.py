"""Channels of layers that are called one sample at a time, that share a weight, or that not every batch calls."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, find_sets, measure, prune_channels
from tests.models import seeded


class OneByOne(nn.Module):
    """Its convolutions get one sample at a time, without a dimension for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(4, 16, 3), nn.ConvTranspose1d(16, 8, 2, stride=2)
        self.last = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.second(self.first(own).relu()).relu()).mean(1) for own in x])


class Tied(nn.Module):
    """Two pairs of layers, in which the second layers, or the first ones, hold one weight."""

    def __init__(self, *, makes: bool) -> None:
        super().__init__()
        self.up, self.other_up = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down, self.other_down = nn.Linear(16, 3), nn.Linear(16, 3)
        if makes:
            self.other_up.weight = self.up.weight
        else:
            self.other_down.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu()) + self.other_down(self.other_up(x).relu())
        return out


class Turned(nn.Module):
    """A layer whose weight is used again, turned around: an autoencoder with tied weights."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.layer(x)), self.layer.weight.t())


class Sometimes(nn.Module):
    """Not every batch reaches its second block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out: Tensor = self.last(x + self.second(x) if x.shape[0] == 16 else x)
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one sample at a time": (OneByOne, (4, 9)),
    "one weight in layers that make a set": (lambda: Tied(makes=True), (8,)),
    "one weight in layers that read a set": (lambda: Tied(makes=False), (8,)),
    "not in every batch": (Sometimes, (8,)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_channels_are_removed_the_whole_way(kind: str) -> None:
    build, shape = NETWORKS[kind]
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(16 - 8 * (place % 2), *shape, generator=generator) for place in range(8)]
    model = seeded(build).eval()
    result = compress(
        model, data, options=prune_channels(keep=(0.75, 0.5)), budget={"bytes": 0.8}, loss="mse", solver="lagrangian"
    )
    report = result.report
    small = sum(parameter.nbytes for parameter in result.model.parameters())
    assert small == report.usage["bytes"] <= 0.8 * sum(parameter.nbytes for parameter in model.parameters())
    tied = {name: parameter.data_ptr() for name, parameter in result.model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for other, same in model.named_parameters(remove_duplicate=False):
            assert (tied[name] == tied[other]) == (parameter is same)
    with torch.no_grad():
        apart = [(result.model(batch) - model(batch)).square().sum(1).mean() for batch in data]
        size = [model(batch).square().sum(1).mean() for batch in data]
    assert float(sum(apart)) < 0.5 * float(sum(size))  # the network is still about the same one


class Chosen(nn.Module):
    """Adds a layer's outputs to another's, or takes them in their place, where a batch has positive inputs."""

    def __init__(self, *, instead: bool) -> None:
        super().__init__()
        self.instead = instead
        self.usual, self.other, self.last = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        positive = bool(x.mean() > 0)
        shares = [self.usual(x).relu()] if not (positive and self.instead) else []
        out: Tensor = self.last(sum([*shares, *([self.other(x).relu()] if positive else [])]))
        return out


@pytest.mark.parametrize(("instead", "first"), [(False, -1), (True, -1), (True, 1)])
def test_channels_stay_where_a_later_batch_calls_other_layers_with_them(instead: bool, first: int) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 8, generator=generator) + sign * first for sign in (1, 1, -1)]
    structure = find_sets(seeded(lambda: Chosen(instead=instead)), data)
    traced, later = ("other", "usual") if first > 0 else ("usual", "other")
    assert structure.sets == ()
    assert f"calls {later!r}" in structure.kept[traced]


def test_channels_of_layers_that_only_some_batches_skip_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(8, 8, generator=generator) + sign for sign in (1, -1)]
    (only,) = find_sets(seeded(lambda: Chosen(instead=False)), data).sets
    assert {axis.tensor for axis in only.axes if axis.reads} == {"last.weight"}


def test_channels_of_a_network_with_sparse_inputs_are_found() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    inputs = torch.eye(8)
    for given in (inputs, inputs.to_sparse()):
        (only,) = find_sets(model, [given], lambda network, batch: network(batch).to_dense()).sets
        assert only.num_units == 16


@pytest.mark.parametrize("inputs", [12, 6])
@pytest.mark.parametrize("scores", ["obs", "fisher", "l1"])
def test_units_that_do_nothing_go_first_where_the_layer_is_read_by_its_own_weight(inputs: int, scores: str) -> None:
    model = seeded(lambda: Turned(inputs))
    with torch.no_grad():
        model.layer.weight[[1, 2, 7]] = 0.0
        model.layer.bias[[1, 2, 7]] = 0.0
    data = [torch.randn(64, inputs, generator=torch.Generator().manual_seed(0))]
    measurement = measure(model, data, prune_channels(keep=(5 / 8,), scores=scores), loss="mse")
    assert measurement.transforms[0][1].removed == (1, 2, 7)  # type: ignore[attr-defined]
    assert measurement.cost[1] < 1e-9
