"""Passes that change the model's parameters are refused by name, and the caller's weights stay as they were."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, measure, prune_channels, prune_quantize
from qcompress.errors import ModelError

BITS = prune_quantize(bits=(4,), sparsity=(0,))


class Network(nn.Module):
    """Three layers; before every pass ``change`` is called with the second one and the inputs."""

    def __init__(self, change: Callable[[nn.Linear, Tensor], object]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self.b, x)
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def clamp_under_no_grad(layer: nn.Linear, x: Tensor) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.1, 0.1)


def replace_data(layer: nn.Linear, x: Tensor) -> None:
    layer.weight.data = layer.weight.data.clamp(-0.1, 0.1)


CHANGES: dict[str, Callable[[nn.Linear, Tensor], object]] = {
    "clamped through data": lambda layer, x: layer.weight.data.clamp_(-0.1, 0.1),
    "scaled through data": lambda layer, x: layer.weight.data.mul_(1.001),
    "clamped": clamp_under_no_grad,
    "replaced": replace_data,
}


def data(count: int = 2) -> list[Tensor]:
    return list(torch.randn(8 * count, 6, generator=torch.Generator().manual_seed(1)).split(8))


@pytest.mark.parametrize("options", [BITS, prune_channels()])
@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_that_changes_parameters_is_refused_by_name_and_changes_nothing(change: str, options: object) -> None:
    for call in (
        lambda model: measure(model, data(), options),
        lambda model: compress(model, data(), budget={"bytes": 0.6}, options=options, time_limit=2),
    ):
        model = Network(CHANGES[change])
        before, memory = model.b.weight.detach().clone(), model.b.weight.data_ptr()
        with pytest.raises(ModelError, match=r"running the model changed its parameters b\.weight"):
            call(model)
        assert torch.equal(model.b.weight, before)
        assert model.b.weight.data_ptr() == memory


@pytest.mark.parametrize("options", [BITS, prune_channels()])
def test_a_change_on_a_later_batch_is_told_as_one(options: object) -> None:
    first = data()[0]
    model = Network(lambda layer, x: None if torch.equal(x, first) else layer.weight.data.clamp_(-0.1, 0.1))
    with pytest.raises(ModelError, match="the weights of the model changed while it was measured"):
        measure(model, data(), options)  # type: ignore[arg-type]
