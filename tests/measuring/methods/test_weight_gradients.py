"""`method="sampled"`: its effects are weight gradients times changes, and its mean is the true second-order form."""

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.measuring import sums
from qcompress.model.batches import samples
from qcompress.model.losses import as_loss
from tests.models import Functional, Reused, TiedLanguageModel, seeded

OPTIONS = qcompress.prune_quantize(bits=(4, 6), sparsity=(0,))


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_squares_of_probes_have_the_loss_curvature_as_their_mean(loss):
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(1, 3, 4, generator=generator)
    found = as_loss(loss)
    draws = found.probe(point.expand(20_000, 3, 4), None, generator).flatten(1).double()  # of each sample its own
    curvature = torch.autograd.functional.hessian(
        lambda moved: found.rise(moved, point, None).sum(), point.double()
    ).reshape(12, 12)
    mean = draws.T @ draws / len(draws)
    # the mean of 20,000 draws of products below 1 is off by less than 5 / sqrt(20,000) of their size
    torch.testing.assert_close(mean, curvature, atol=0.035 * float(curvature.abs().max()), rtol=0)


def test_costs_are_near_those_of_the_second_order_on_many_samples():
    model = seeded(TiedLanguageModel)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(11, (100, 6), generator=generator) for _ in range(20)]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled")
    linear = qcompress.measure(model, data, OPTIONS)
    # relative standard error of a mean of 2,000 squares: sqrt(2 / 2,000), 3 %; five of them
    changed = linear.cost > 0
    np.testing.assert_allclose(sampled.cost[changed], linear.cost[changed], rtol=0.16)
    assert (sampled.cost[~changed] == 0).all()
    spread = sampled.standard_error[changed] / sampled.cost[changed]
    np.testing.assert_allclose(spread, (2 / 2000) ** 0.5, rtol=0.6)  # that of squares of normal numbers, or near it
    pairs, expected = (own.factor @ own.factor.T for own in (sampled, linear))
    sizes = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert (np.abs(pairs - expected) <= 0.16 * sizes).all()  # likewise


@pytest.mark.parametrize("factory", [Reused, Functional])
@pytest.mark.usefixtures("estimates_alone")
def test_every_use_of_a_weight_counts(factory):
    """Called several times or used outside its module: the weight's own gradient sees all of it."""
    model = seeded(factory)
    generator = torch.Generator().manual_seed(0)
    data = [
        torch.randn(4, 5, generator=generator) if factory is Reused else torch.randint(7, (4, 3), generator=generator)
    ]
    measurement = qcompress.measure(
        model, data, OPTIONS, method="sampled", loss=lambda out, _: out.reshape(len(out), -1).sum(1)
    )
    part = measurement.parts[0]
    for option, transform in enumerate(measurement.transforms[0][1:], start=1):
        change = transform.approximate(measurement.weight(0, part.weight(model))) - part.weight(model)
        total = 0.0
        for sample in data[0]:
            weight = model.get_submodule(part.modules[0]).weight
            effect = float((torch.autograd.grad(model(sample[None]).sum(), weight)[0] * change).sum())
            total += effect + 0.5 * effect**2
        assert measurement.cost[option] == pytest.approx(total / 4, rel=1e-4)


@pytest.mark.usefixtures("estimates_alone")
def test_blocks_of_channels_add_up_to_their_layer():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)))
    data = [torch.randn(6, 8, generator=torch.Generator().manual_seed(0))]
    loss = lambda output, _: output.sum(1)  # noqa: E731
    eight_bits = qcompress.prune_quantize(bits=(8,), sparsity=(0,))
    blocks = qcompress.measure(model, data, eight_bits, method="sampled", loss=loss, granularity=4)
    whole = qcompress.measure(model, data, eight_bits, method="sampled", loss=loss)
    # first-order effects are sums over the weight's rows; the second order of an 8-bit rounding is far below them
    first = blocks.cost.reshape(-1, 2)[:3, 1].sum()
    assert first == pytest.approx(whole.cost[1], rel=1e-2, abs=1e-6)


def test_flags_and_gradients_are_as_before():
    model = seeded(TiedLanguageModel).requires_grad_(True)
    qcompress.measure(
        model, [torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))], OPTIONS, method="sampled"
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("estimates_alone")
def test_beyond_so_many_samples_columns_are_shared_and_costs_are_not(monkeypatch):
    model = seeded(TiedLanguageModel)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(11, (10, 6), generator=generator) for _ in range(3)]
    whole = qcompress.measure(model, data, OPTIONS, method="sampled")
    monkeypatch.setattr(sums, "SKETCH_RANK", 8)
    shared = qcompress.measure(model, data, OPTIONS, method="sampled")
    assert (whole.factor.shape[1], shared.factor.shape[1]) == (30, 8)
    assert (shared.cost == whole.cost).all()
    assert (shared.standard_error == whole.standard_error).all()
    np.testing.assert_allclose(0.5 * np.square(whole.factor).sum(1), whole.cost)


def test_a_cut_run_goes_on_to_the_same_numbers(tmp_path):
    model = seeded(TiedLanguageModel)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(11, (2, 6), generator=generator) for _ in range(4)]
    whole = qcompress.measure(model, data, OPTIONS, method="sampled")

    class CutError(Exception):
        pass

    def stop(progress):
        if progress.batches == 2:
            raise CutError

    with pytest.raises(CutError):
        qcompress.measure(model, data, OPTIONS, method="sampled", cache=tmp_path / "part", on_progress=stop)
    again = qcompress.measure(model, data, OPTIONS, method="sampled", cache=tmp_path / "part")
    assert again.cost.tolist() == whole.cost.tolist()
    assert again.factor.tolist() == whole.factor.tolist()
    assert again.standard_error.tolist() == whole.standard_error.tolist()


@pytest.mark.parametrize("batch", [torch.ones(3, 2), (torch.ones(3, 2), torch.ones(3)), {"a": torch.ones(3, 2)}])
def test_batches_are_taken_apart(batch):
    assert len(list(samples(batch))) == 3


def test_what_cannot_be_taken_apart_stays_whole():
    batch = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    assert list(samples(batch)) == [batch]


class Unseen(nn.Module):
    """Its first layer has an effect that autograd does not see."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step, self.first, self.last = step, nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.step == "no_grad":
            with torch.no_grad():
                inner = self.first(x)
        elif self.step == "detach":
            inner = self.first(x).detach()
        elif self.step == "round":
            inner = torch.round(8 * self.first(x)) / 8
        else:
            inner = torch.from_numpy(self.first(x).detach().numpy())
        return self.last(torch.relu(inner))


@pytest.mark.parametrize("granularity", ["layer", 4])
@pytest.mark.parametrize("step", ["no_grad", "detach", "round", "numpy"])
def test_a_missing_gradient_is_not_taken_for_no_effect(step, granularity):
    model = seeded(lambda: Unseen(step))
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(16, 6, generator=generator) for _ in range(2)]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled", granularity=granularity)
    direct = qcompress.measure(model, data, OPTIONS, method="direct", granularity=granularity)
    tried = [part.name for part in sampled.parts if part.modules == ("first",)]
    assert set(sampled.tried) == set(tried)
    count = 3 * len(tried)
    assert (direct.cost[:count] > 0).sum() == 2 * len(tried)
    np.testing.assert_allclose(sampled.cost[:count], direct.cost[:count], rtol=1e-6)


def test_a_model_that_autograd_sees_nothing_of_is_tried_whole():
    class NoGradient(nn.Sequential):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    model = seeded(lambda: NoGradient(nn.Linear(5, 4)))
    data = [torch.randn(8, 5, generator=torch.Generator().manual_seed(0))]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled")
    direct = qcompress.measure(model, data, OPTIONS, method="direct")
    np.testing.assert_allclose(sampled.cost, direct.cost, rtol=1e-6)


class TimeMajor(nn.Module):
    """Rows of a batch are steps in time: the outputs of one depend on those before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.memory, self.last = nn.Linear(5, 8), nn.RNN(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.memory(3 * self.first(x))[0])


class BatchStatistics(nn.Sequential):
    """Samples of a batch depend on each other, and one alone cannot be run."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("factory", "shape"),
    [pytest.param(TimeMajor, (4, 3, 5), marks=pytest.mark.slow), (BatchStatistics, (6, 5))],
)
def test_rows_that_depend_on_each_other_are_not_taken_apart(factory, shape):
    model = seeded(factory)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(shape, generator=generator) for _ in range(300)]
    sampled = qcompress.measure(model, data, OPTIONS, method="sampled")
    direct = qcompress.measure(model, data, OPTIONS, method="direct")
    changed = direct.cost > 0
    # a batch is one draw: five relative standard errors of sqrt(2 / 300)
    np.testing.assert_allclose(sampled.cost[changed], direct.cost[changed], rtol=0.41)
    assert sampled.num_samples == direct.num_samples


def test_a_loss_that_reads_its_whole_batch_is_that_of_whole_batches():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    inputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).split(4)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def cost(more: dict[str, torch.Tensor]) -> np.ndarray:
        return qcompress.measure(
            model,
            [{"x": own, "w": weights, **more} for own in inputs],
            OPTIONS,
            method="sampled",
            loss=lambda output, batch: output.square().sum(-1) * batch["w"].sum(),
            forward=lambda network, batch: network(batch["x"]),
        ).cost

    np.testing.assert_array_equal(cost({}), cost({"of another length, so that it is not split": torch.ones(3)}))


def words(*, sparse: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(20, 8, sparse=sparse), torch.nn.Flatten(), torch.nn.Linear(40, 4))


def test_sparse_gradients_are_those_of_a_dense_embedding():
    data = [torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(index)) for index in range(3)]
    costs = [qcompress.measure(words(sparse=sparse), data, OPTIONS, method="sampled").cost for sparse in (True, False)]
    np.testing.assert_allclose(*costs, rtol=1e-5)


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_gradients_of_the_caller_are_neither_counted_nor_lost(method):
    data = [torch.randint(20, (8, 5), generator=torch.Generator().manual_seed(0))]
    model = words(sparse=False)
    expected = qcompress.measure(model, data, OPTIONS, method=method).cost
    model(data[0]).square().sum().backward()
    before = [weight.grad for weight in model.parameters()]
    copies = [gradient.clone() for gradient in before]
    np.testing.assert_array_equal(qcompress.measure(model, data, OPTIONS, method=method).cost, expected)
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, copies))
