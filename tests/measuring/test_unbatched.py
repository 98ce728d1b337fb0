"""Layers that are called sample by sample, or inside a function transform, are measured as on whole batches."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.function_transforms import in_transform, outside_transforms
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.inputs.squares import input_squares
from qcompress.model.parts import survey

OPTIONS = qcompress.prune_quantize(bits=(2, 4), sparsity=(0,), compensated=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 5)

    def each(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.each(x)


class Loop(Net):
    def forward(self, x):
        return torch.stack([self.each(sample) for sample in x])


class Mapped(Net):
    def forward(self, x):
        return torch.func.vmap(self.each)(x)


class MappedTwice(Net):
    def forward(self, x):
        rows = x.view(4, 4, 12).movedim(2, 1)  # the samples of a group along its last dimension
        return torch.func.vmap(torch.func.vmap(self.each, in_dims=1))(rows).flatten(0, 1)


class Slope(Net):
    """Reads the gradient of a layer with respect to its input, worked out in one of several ways."""

    def slope(self, x: Tensor) -> Tensor:
        return (1 - torch.tanh(self.a(x)).square()) @ self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x) + self.slope(x).sum(1, keepdim=True)))))


class ByTransform(Slope):
    def slope(self, x):
        return torch.func.grad(lambda given: torch.tanh(self.a(given)).sum())(x.clone())


class ByAutograd(Slope):
    def slope(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(torch.tanh(self.a(x)).sum(), x, create_graph=True)[0]


class Convolutions(nn.Module):
    def __init__(self, *, loop: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop, self.k, self.t = loop, nn.Conv1d(1, 4, 3), nn.ConvTranspose1d(4, 4, 3, stride=2)
        self.c = nn.Linear(84, 5)

    def forward(self, x):
        if self.loop:
            return torch.stack([self.c(self.t(torch.relu(self.k(sample[None]))).flatten()) for sample in x])
        return self.c(self.t(torch.relu(self.k(x[:, None]))).flatten(1))


PAIRS = {
    "loop": (Loop, Net),
    "mapped": (Mapped, Net),
    "mapped twice": (MappedTwice, Net),
    "grad": (ByTransform, Slope),
    "autograd": (ByAutograd, Slope),
    "convolutions": (lambda: Convolutions(loop=True), lambda: Convolutions(loop=False)),
}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 12, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", PAIRS)
def test_moments_are_those_of_whole_batches(name, data):
    found, expected = (second_moments(make(), survey(make(), data).parts, data, None)[0] for make in PAIRS[name])
    assert found.keys() == expected.keys()
    for path, moments in expected.items():
        torch.testing.assert_close(found[path], moments)


@pytest.mark.parametrize("name", PAIRS)
def test_squares_are_those_of_whole_batches(name, data):
    found, expected = (input_squares(make(), survey(make(), data).parts, data, None) for make in PAIRS[name])
    for path, squares in expected.items():
        torch.testing.assert_close(found[path], squares)


@pytest.mark.parametrize("method", ["fisher", "direct"])
@pytest.mark.parametrize(
    "options",
    [OPTIONS, pytest.param(qcompress.low_rank(ratios=(0.3,)), marks=pytest.mark.slow),
     qcompress.integer_products(("static",))],
)  # fmt: skip
@pytest.mark.parametrize("name", PAIRS)
def test_costs_are_those_of_whole_batches(name, options, method, data):
    make, plain = PAIRS[name]
    found = qcompress.measure(make(), data, options, method=method)
    exact = qcompress.measure(plain(), data, options, method="direct")
    assert found.cost.max() > 5e-8
    if method == "direct":
        np.testing.assert_allclose(found.cost, exact.cost, rtol=0.05, atol=1e-9)
    else:
        expected = qcompress.measure(plain(), data, options, method=method)
        between = np.minimum(exact.cost, expected.cost), np.maximum(exact.cost, expected.cost)
        assert (found.cost >= 0.9 * between[0] - 1e-9).all()
        assert (found.cost <= 1.1 * between[1] + 1e-9).all()


@pytest.mark.parametrize("name", PAIRS)
def test_the_default_options_compress_them(name, data):
    make, plain = PAIRS[name]
    found = qcompress.compress(make(), data, budget={"bytes": 0.4}, time_limit=2, guard=False)
    true = qcompress.mean_loss(plain(), plain_with(plain(), found.model), data)
    assert found.report.loss_measured == pytest.approx(true, rel=1e-3)


def plain_with(plain, smaller):
    plain.load_state_dict(smaller.state_dict())
    return plain


@pytest.mark.parametrize("name", ["loop", "convolutions"])
def test_channels_of_them_are_removed(name, data):
    smaller = qcompress.compress(
        PAIRS[name][0](), data, budget={"macs": 0.8}, options=qcompress.prune_channels(keep=(0.5, 0.75)), guard=False
    )
    assert smaller.report.loss_measured > 0
    assert sum(tensor.numel() for tensor in smaller.model.parameters()) < 0.9 * sum(
        tensor.numel() for tensor in PAIRS[name][0]().parameters()
    )


def test_channels_of_a_model_without_gradients_are_removed(data):
    class Silent(Net):
        @torch.no_grad()
        def forward(self, x):
            return self.each(x)

    smaller = qcompress.compress(Silent(), data, budget={"macs": 0.8}, options=qcompress.prune_channels(), guard=False)
    assert smaller.report.loss_measured > 0


def test_what_a_transform_does_to_channels_is_told(data):
    with pytest.raises(qcompress.errors.NoChannelsError, match="is not supported"):
        qcompress.measure(Mapped(), data, qcompress.prune_channels())


@pytest.mark.parametrize(("make", "word"), [(ByTransform, "func"), (Mapped, "func"), (ByAutograd, "itself")])
def test_rounding_without_a_gradient_is_refused_by_name(make, word, data):
    with pytest.raises(qcompress.errors.ModelError, match=f"{word}.*'fisher' or 'direct'"):
        qcompress.measure(make(), data, qcompress.integer_products(), method="sampled")


def test_outside_of_transforms_tensors_are_themselves():
    tensor = torch.ones(2)
    with outside_transforms(tensor) as (same,):
        assert same is tensor
    assert not in_transform()
    assert torch.func.vmap(lambda x: x + in_transform())(tensor).tolist() == [2.0, 2.0]
