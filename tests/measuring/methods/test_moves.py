"""Layers are moved together, and still every layer whose gradient is wrong is found."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import measure, prune_quantize
from qcompress.measuring.methods.evidence import MISLED

DEPTH = 12


def half_cut(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def slightly_wrong(x: Tensor) -> Tensor:
    return 1.4 * x - (0.4 * x).detach()


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(16 * x) / 16 - x).detach()


def rounded_beside(x: Tensor) -> Tensor:
    return x + torch.round(16 * x) / 16


LIARS: dict[str, Callable[[Tensor], Tensor]] = {
    "half cut": half_cut,
    "slightly wrong": slightly_wrong,
    "straight through": straight_through,
    "rounded beside": rounded_beside,
}


class Deep(nn.Module):
    """Residual layers, and what is done to the output of one of them."""

    def __init__(self, at: int, step: Callable[[Tensor], Tensor], nonlinear: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(DEPTH))
        self.head = nn.Linear(12, 4)
        self.at, self.step, self.nonlinear = at, step, nonlinear
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for number, layer in enumerate(self.layers):
            y = layer(x)
            x = x + self.nonlinear(self.step(y) if number == self.at else y)
        return self.head(x)


def deep(at: int, step: Callable[[Tensor], Tensor], nonlinear: Callable[[Tensor], Tensor], seed: int) -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Deep(at, step, nonlinear)


def batch(seed: int) -> Tensor:
    return torch.randn(48, 12, generator=torch.Generator().manual_seed(seed))


OPTIONS = prune_quantize(bits=(6,), sparsity=(0,))


@pytest.mark.parametrize("nonlinear", [torch.tanh, torch.relu, lambda x: torch.tanh(20 * x)])
@pytest.mark.parametrize("liar", LIARS)
def test_a_single_wrong_gradient_among_many_layers_is_found(liar: str, nonlinear: Callable[[Tensor], Tensor]) -> None:
    for seed, at in enumerate((0, 5, DEPTH - 1)):
        tried = measure(deep(at, LIARS[liar], nonlinear, seed), [batch(seed)], OPTIONS).tried
        assert tried.get(f"layers.{at}") == MISLED


@pytest.mark.parametrize("nonlinear", [torch.tanh, torch.relu])
def test_layers_are_moved_together_where_all_gradients_are_right(nonlinear: Callable[[Tensor], Tensor]) -> None:
    model = deep(0, lambda x: x, nonlinear, 0)
    assert not measure(model, [batch(0)], OPTIONS).tried
    before = model.passes
    measure(model, [batch(0), batch(1), batch(2)], OPTIONS)
    assert model.passes - before < 3 * DEPTH  # a pass for every layer and batch would be more


class Gated(nn.Module):
    """The share of a layer in the outputs is so small that its square is 0 in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.faint, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)) + 1e-30 * torch.tanh(self.faint(x)))


def fading() -> nn.Module:
    """The outputs hardly depend on their inputs."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()) for _ in range(2)]
    for block in blocks:
        nn.init.zeros_(block[0].bias)
        block[0].weight.data.mul_(1e-16)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("make", "shape", "faint"), [(Gated, (16, 8), ("faint",)), (fading, (4, 6, 5, 5), ("0.0", "1.0", "4"))]
)
def test_a_layer_whose_effect_underflows_has_no_cost(
    make: Callable[[], nn.Module], shape: tuple[int, ...], faint: tuple[str, ...]
) -> None:
    data = [torch.randn(shape, generator=torch.Generator().manual_seed(0))]
    measurement = measure(make(), data, prune_quantize(bits=(2, 8), sparsity=(0,)))
    names = [part.name for part in measurement.parts]
    costs = dict(zip(names, np.split(measurement.cost, len(names)), strict=True))
    assert all(np.abs(costs[name]).max() < 1e-12 for name in faint)
    assert measurement.tried == {}
