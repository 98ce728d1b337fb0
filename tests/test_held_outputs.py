"""Outputs that a model overwrites in its next pass, or that are state, are measured as those of any other model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.layerwise_fit import fit_in_turn_
from qcompress.model.forward import run
from qcompress.model.parts import survey
from qcompress.model.steady import steady
from tests.quick import slow_but

OPTIONS = qcompress.prune_quantize(bits=(2, 4), sparsity=(0,))
ELSEWHERE = torch.zeros(16, 5)
"""A buffer that no walk over a model finds."""


class Net(nn.Module):
    """Returns a new tensor; the others compute the same numbers, and return them in memory that is used again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(12, 24), nn.Linear(24, 5)
        self.register_buffer("state", torch.zeros(16, 5))
        self.out, self.array = torch.zeros(16, 5), np.zeros((16, 5), dtype=np.float32)
        inner = torch.zeros(16, 5)
        self.write = lambda values: inner.copy_(values)

    def plain(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x)


class WholeBatches(Net):
    """Refuses to run samples one by one, as the others do."""

    def forward(self, x):
        return self.plain(x) + torch.zeros(16, 5)[: len(x) // 16 * 16]


class State(Net):
    def forward(self, x):
        with torch.no_grad():
            self.state.mul_(0.5).add_(self.plain(x))
        return self.state


class Static(Net):
    @torch.no_grad()
    def forward(self, x):
        self.out[: len(x)].copy_(self.plain(x))
        return self.out[: len(x)]


class Whole(Net):
    @torch.no_grad()
    def forward(self, x):
        return self.out.copy_(self.plain(x))


class Elsewhere(Net):
    @torch.no_grad()
    def forward(self, x):
        return ELSEWHERE.copy_(self.plain(x))


class Closure(Net):
    @torch.no_grad()
    def forward(self, x):
        return self.write(self.plain(x))


class Array(Net):
    @torch.no_grad()
    def forward(self, x):
        self.array[:] = self.plain(x).numpy()
        return torch.from_numpy(self.array)


class Logits(Net):
    @torch.no_grad()
    def forward(self, x):
        return SimpleNamespace(logits=self.state.copy_(self.plain(x)))


class Inference(Net):
    def forward(self, x):
        with torch.inference_mode():
            return self.out.copy_(self.plain(x))


class Detached(Net):
    def forward(self, x):
        self.out = self.out.detach()
        self.out.copy_(self.plain(x))
        return self.out


class WithGradient(Net):
    def forward(self, x):
        self.state.copy_(self.plain(x))
        return self.state


class AttributeWithGradient(Net):
    def forward(self, x):
        return self.out.copy_(self.plain(x))


KINDS = (
    State, Static, Whole, Elsewhere, Closure, Array, Logits, Inference, Detached, WithGradient, AttributeWithGradient,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 12, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("forward", [None, steady(None)], ids=["plain", "steady"])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_output_stays_what_it_is(make, forward, gradients, data):
    model = make()
    with torch.set_grad_enabled(gradients):
        outputs = [run(model, batch, forward).detach() for batch in data]
        if make is not State or forward is not None:
            expected = [Net().plain(batch).detach() for batch in data]
            torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert not torch.equal(outputs[0], outputs[1])
    assert model.state.grad_fn is None or forward is None
    assert model.out.grad_fn is None


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_costs_are_those_of_a_model_that_returns_new_tensors(make, method, data):
    found = qcompress.measure(make(), data, OPTIONS, method=method)
    by_gradients = make in (Detached, WithGradient, AttributeWithGradient)
    expected = qcompress.measure(WholeBatches(), data, OPTIONS, method=method if by_gradients else "direct")
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-4, atol=1e-9)
    assert (found.cost[1:3] > 1e-6).all()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("guard", slow_but([True], [False, True]))
def test_losses_are_those_of_a_model_that_returns_new_tensors(make, guard, data):
    found = qcompress.compress(make(), data, budget={"bytes": "36%"}, options=OPTIONS, guard=guard, seed=0)
    expected = qcompress.compress(Net(), data, budget={"bytes": "36%"}, options=OPTIONS, guard=guard, seed=0)
    assert [part.option for part in found.report.parts] == [part.option for part in expected.report.parts]
    assert found.report.loss_measured == pytest.approx(expected.report.loss_measured, rel=1e-4)
    assert expected.report.loss_measured > 1e-4
    assert found.report.loss_predicted == pytest.approx(found.report.loss_measured, rel=0.5)
    mean = qcompress.mean_loss(make(), found.model, data)
    assert mean == pytest.approx(qcompress.mean_loss(Net(), expected.model, data), rel=1e-4)


@pytest.mark.parametrize("make", [make for make in KINDS if make is not State])
def test_a_teacher_may_return_its_buffer(make, data):
    torch.manual_seed(3)
    student = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    found, expected = (qcompress.finetune(student, data, 8, teacher=teacher()) for teacher in (make, Net))
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], value)


class Reused(nn.Module):
    """Gives its layers inputs in one buffer, or in a new tensor each."""

    def __init__(self, *, reuse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reuse = reuse
        with torch.inference_mode():
            self.room = torch.zeros(16, 12)
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def _given(self, x: Tensor) -> Tensor:
        return self.room.copy_(x) if self.reuse else x

    def forward(self, x):
        with torch.inference_mode():
            x = torch.relu(self.a(self._given(x)))
            x = torch.relu(self.b(self._given(x)))
            return self.c(self._given(x)).clone()


@pytest.mark.parametrize("count", [1, 4])
def test_moments_of_inputs_in_one_buffer_are_those_of_each_layer(count, data):
    found, expected = (
        second_moments(model, survey(model, data).parts, data[:count], None)[0]
        for model in (Reused(reuse=True), Reused(reuse=False))
    )
    assert found.keys() == {"a", "b", "c"}
    for path, moments in expected.items():
        torch.testing.assert_close(found[path], moments)


class Fitted(Reused):
    """The same with a buffer that a backward pass could go through, between passes put back."""

    def __init__(self, *, reuse: bool) -> None:
        super().__init__(reuse=reuse)
        self.room = torch.zeros(16, 12)

    def _given(self, x: Tensor) -> Tensor:
        return self.room[:, : x.shape[1]].copy_(x) if self.reuse else x

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.reuse):
            x = self.a(self._given(x))
            x = self.c(torch.relu(self.b(self._given(torch.relu(x)))))
            return x.clone()


@pytest.mark.parametrize("count", [1, 4])
def test_layers_are_fitted_to_their_inputs_in_one_buffer(count, data):
    options, fitted = qcompress.prune_channels(keep=(0.5,)), []
    for reuse in (True, False):
        model = Fitted(reuse=reuse)
        plain = Fitted(reuse=False)
        measurement = qcompress.measure(plain, data, options, loss="mse")
        problem = qcompress.formulate(measurement, {"macs": 0.7})
        smaller = qcompress.apply(plain, measurement, qcompress.solve(problem, "brute-force"))
        smaller.reuse = reuse
        fitted.append(fit_in_turn_(smaller, model, data[:count]))
    for key, value in fitted[1].state_dict().items():
        torch.testing.assert_close(fitted[0].state_dict()[key], value)
