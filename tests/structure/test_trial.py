"""Sets are tested on samples and with a tolerance that show a difference, whatever the first samples are."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress.compressed.removal import mask_, remove_
from qcompress.structure.find import find_sets
from qcompress.structure.trial import _tolerance


class Attention(nn.Module):
    """Knows its number of heads, but not their width: with fewer channels in every head, it scrambles them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(*sizes) for sizes in ((12, 32), (12, 32), (12, 32), (32, 12)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        out: Tensor = x + self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Averaged(nn.Module):
    """Divides by its width, which is another one afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        out: Tensor = self.last(y / y.shape[-1])
        return out


def network(kind: type[nn.Module]) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(kind(), *([nn.Linear(12, 3)] if kind is Attention else [])).eval()
    for parameter in model.parameters():
        parameter.data *= 2
    return model


def words(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


FIRST = {
    "usual": [],
    "silent": [torch.zeros(4, 6, 12)],
    "constant": [torch.ones(4, 6, 12)],
    "one word": [torch.full((4, 1, 12), 0.5)],
    "silent at first": [torch.zeros(2, 6, 12)],
}


@pytest.mark.parametrize("kind", [Attention, Averaged])
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_what_is_left_computes_what_was_masked(kind: type[nn.Module], first: str, offset: float, factor: float) -> None:
    model, others = network(kind), words(12, 6, 12)
    last = model[1] if kind is Attention else model[0].last
    with torch.no_grad():
        last.weight[0] *= factor
        last.bias += offset
    data = [*FIRST[first], *others.split(4)]
    if first == "silent at first":
        data = [torch.cat(data)]
    sets = find_sets(model, data).sets
    assert kind is not Averaged or sets == ()
    model, last.bias.data = model.double(), last.bias.data.double() - offset
    for item in sets:
        for count in (1, item.num_units // 2):
            removed = {item.name: np.arange(count)}
            masked, smaller = (
                change(copy.deepcopy(model), sets, removed)(others.double())[..., 1:] for change in (mask_, remove_)
            )
            assert float((smaller - masked).abs().max()) < 1e-3 * float(masked.std())


def test_a_difference_is_small_beside_what_varies() -> None:
    outputs = words(8, 6, 3)
    beside_a_constant = outputs + torch.tensor([0.0, 1e3, 0.0])
    beside_a_large_one = outputs * torch.tensor([1e5, 1.0, 1.0])
    for changed, most in ((outputs, 2e-3), (beside_a_constant, 2e-3), (beside_a_large_one, 0.2)):
        assert float(_tolerance(changed)[..., 2].max()) < most * float(outputs[..., 2].std())
    assert bool((_tolerance(outputs) <= 1e-3 * outputs.abs().max()).all())
    assert float(_tolerance(torch.full((1, 1), 5.0))) == pytest.approx(5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_sound_sets_pass_in_every_number_format(dtype: torch.dtype, offset: float) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    with torch.no_grad():
        model[2].bias += offset
    found = find_sets(model.to(dtype), [batch.to(dtype) for batch in words(16, 12).split(4)])
    assert [item.num_units for item in found.sets] == [32], found.kept


class Normalised(nn.Module):
    """Divides by a sum that is zero if the last channel is gone and a sample is silent."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 4), nn.Linear(4, 3)
        with torch.no_grad():
            self.first.bias.copy_(torch.tensor([-1.0, -1.0, -1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        out: Tensor = self.last(y / y.sum(1, keepdim=True))
        return out


def test_a_masked_network_that_is_not_finite_keeps_the_channels() -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Normalised().eval()
    found = find_sets(model, [torch.zeros(4, 12), torch.zeros(4, 12)])
    assert found.sets == ()
    assert found.kept
