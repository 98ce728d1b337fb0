"""Channels of layers that are called one sample at a time, that share a weight, or that not every batch calls."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, prune_channels
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
