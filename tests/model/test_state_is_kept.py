"""The caller's model has its state back after everything that runs it, also buffers that its passes change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    apply,
    compress,
    find_sets,
    finetune,
    fit_in_turn_,
    formulate,
    measure,
    prune_channels,
    prune_quantize,
    solve,
    time_options,
)

CODES, CHANNELS = prune_quantize(bits=(4, 8), sparsity=(0,)), prune_channels(keep=(0.5,))


class Counting(nn.Module):
    """Counts its passes, remembers its last output, and makes the words of its embedding shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(20, 8, max_norm=0.5), nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8, 4))

    def forward(self, ids: Tensor) -> Tensor:
        self.passes += 1
        out: Tensor = self.last(self.first(self.embed(ids).mean(1)).relu())
        self.seen = out.detach()
        return out


def fitted(model: nn.Module, data: list[Tensor]) -> Any:
    measurement = measure(model, data, CHANNELS)
    smaller = apply(model, measurement, solve(formulate(measurement, {"macs": 0.7}), "greedy"))
    before = {name: tensor.clone() for name, tensor in smaller.named_buffers()}
    fit_in_turn_(smaller, model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.named_buffers())


CALLS: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "find_sets": find_sets,
    "measure channels": lambda model, data: measure(model, data, CHANNELS),
    "measure both": lambda model, data: measure(model, data, CHANNELS + CODES),
    "compress channels": lambda model, data: compress(
        model, data, options=CHANNELS, budget={"macs": 0.7}, solver="greedy"
    ),
    "fit_in_turn_": fitted,
    "time_options": lambda model, data: time_options(model, measure(model, data, CODES), data[0], repeats=1),
    "time_options of channels": lambda model, data: time_options(
        model, measure(model, data, CHANNELS), data[0], repeats=1
    ),
    "finetune": lambda model, data: finetune(
        apply(model, found := measure(model, data, CODES), solve(formulate(found, {"bytes": 0.7}), "greedy")),
        data, 2, teacher=model,
    ),
}  # fmt: skip


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, (8, 5), generator=generator) for _ in range(4)]


@pytest.mark.parametrize("call", CALLS)
def test_buffers_and_limited_embeddings_are_as_before(call: str, data: list[Tensor]) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Counting().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CALLS[call](model, data)
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == []
