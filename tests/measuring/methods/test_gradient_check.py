"""Gradients that are there and wrong are found; those that are right are never accused."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.measuring.methods.gradient_check import misleading
from tests.models import Residual, TiedLanguageModel, seeded
from tests.quick import slow_but

OPTIONS = qcompress.prune_quantize(bits=(4, 6), sparsity=(0,))


class Misled(nn.Module):
    """Its first layer has a gradient that does not tell all."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step = step
        self.first, self.last, self.other = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x)
        if self.step == "straight-through":
            inner = inner + (4 * torch.tanh(inner) - inner).detach()
        elif self.step == "rounding":
            inner = inner + (torch.round(2 * inner) / 2 - inner).detach()
        elif self.step == "half detached":
            inner = 0.2 * inner + (0.8 * inner).detach()
        return self.last(inner) + self.other(x)


@pytest.mark.parametrize("step", ["straight-through", "half detached", "rounding"])
def test_a_gradient_that_is_there_and_wrong_is_found_and_its_options_are_tried(step: str) -> None:
    model = seeded(lambda: Misled(step))
    data = [torch.randn(32, 6, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled")
    direct = qcompress.measure(model, data, OPTIONS, method="direct")
    assert sampled.tried == {"first": "the outputs do not follow its gradient"}
    np.testing.assert_allclose(sampled.cost[:3], direct.cost[:3], rtol=1e-4)


class OneOfTwoPaths(nn.Module):
    """A detached path beside one that is not: what the gradient of the first layer lacks is at right angles to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.seen, self.cut, self.last = (
            nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.seen(h)) + torch.tanh(self.cut(h.detach())))


def test_a_gradient_that_lacks_one_of_two_paths_is_found() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        model, x = OneOfTwoPaths(), torch.randn(1, 16)
        weights = [model.first.weight, model.seen.weight, model.cut.weight, model.last.weight]
        generator = torch.Generator().manual_seed(seed)
        assert misleading(lambda model=model, x=x: model(x), weights, generator) == [0], seed


class Gated(nn.Module):
    """What networks have that bends: rectifiers, maxima, normalisation, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(16, 30)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids))).sort(-1).values


def words(seed: int) -> Tensor:
    return torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))


def images(seed: int) -> Tensor:
    return torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("make", "inputs"), [(TiedLanguageModel, words), (Residual, images), (Gated, words)])
def test_right_gradients_are_not_accused(make: Callable[[], nn.Module], inputs: Callable[[int], Tensor]) -> None:
    for seed in range(25):
        torch.manual_seed(seed)
        model = make().eval()
        weights = [
            module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
        ]
        weights = list(dict.fromkeys(weights))
        before = [weight.detach().clone() for weight in weights]
        found = misleading(partial(model, inputs(seed)), weights, torch.Generator().manual_seed(seed))
        assert found == [], seed
        assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


class Deep(nn.Module):
    """Many residual layers, one of which may have the same output everywhere behind a gradient of 1."""

    def __init__(self, depth: int, constant: int | None) -> None:
        super().__init__()
        self.layers, self.constant = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth)), constant

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            y = layer(x)
            if index == self.constant:
                y = y + (0.3 - y).detach()
            x = x + torch.tanh(y) / len(self.layers) ** 0.5
        return x


@pytest.mark.parametrize("depth", slow_but([60], [60, 200, 400]))
def test_one_wrong_gradient_is_found_among_many_layers(depth: int) -> None:
    for constant in (None, depth // 2, depth - 1):
        torch.manual_seed(depth)
        model, x = Deep(depth, constant), torch.randn(1, 16)
        weights = [layer.weight for layer in model.layers]
        found = misleading(lambda model=model, x=x: model(x), weights, torch.Generator().manual_seed(0))
        assert found == ([] if constant is None else [constant])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", ["none", "straight-through", "half detached", "rounding"])
def test_gradients_in_half_precision_are_judged_as_in_float32(step: str, dtype: torch.dtype) -> None:
    model = seeded(lambda: Misled(step)).to(dtype)
    before = {name: (own.data_ptr(), own.clone()) for name, own in model.named_parameters()}
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled")
    assert sampled.tried == ({} if step == "none" else {"first": "the outputs do not follow its gradient"})
    for name, own in model.named_parameters():
        assert own.data_ptr() == before[name][0]
        assert torch.equal(own, before[name][1])


class AsksForHalf(nn.Module):
    """Its code names a dtype, so that it runs in no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).to(torch.bfloat16))


def test_a_model_that_runs_in_half_precision_only_is_measured_all_the_same() -> None:
    model = seeded(AsksForHalf).bfloat16()
    data = [torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()]
    found = qcompress.measure(model, data, OPTIONS, method="sampled")
    assert found.tried == {}
    assert model.first.weight.dtype == torch.bfloat16


def test_right_gradients_in_half_precision_are_not_accused() -> None:
    for make, inputs in ((Gated, words), (TiedLanguageModel, words)):
        model = seeded(make).bfloat16()
        found = qcompress.measure(
            model, [inputs(0)], OPTIONS, method="sampled", loss="mse", forward=lambda model, batch: model(batch)
        )
        assert found.tried == {}


def test_steps_lost_in_half_precision_accuse_no_one() -> None:
    layer = nn.Linear(4, 4).bfloat16()
    inputs = torch.ones(2, 4, dtype=torch.bfloat16)
    assert (
        misleading(
            lambda: torch.round(layer(inputs)).float() + layer(inputs).float(), [layer.weight], torch.Generator()
        )
        == []
    )
