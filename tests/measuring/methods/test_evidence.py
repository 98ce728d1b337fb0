"""Where a gradient does not tell all that a weight does, its options are tried instead: the costs are the true ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Measurement, Options, measure, prune_quantize
from qcompress.model.forward import Forward, run
from qcompress.model.losses import as_loss
from tests.measurements import changed_copies
from tests.models import Functional, seeded

FINE = prune_quantize(bits=(8,), sparsity=(0,))


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(count: int, *shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def true_costs(
    model: nn.Module, data: list[Any], measurement: Measurement, loss: str = "mse", forward: Forward | None = None
) -> np.ndarray:
    """``(V,)`` mean loss of copies of the model with one option of one part in them each."""
    found = []
    for changed in changed_copies(model, measurement):
        pairs = [(run(changed, own, forward), run(model, own, forward), own) for own in data]
        found.append(float(torch.cat([as_loss(loss).rise(*own) for own in pairs]).mean()))
    return np.array(found)


def assert_true(
    model: nn.Module,
    data: list[Any],
    *,
    loss: str = "mse",
    rtol: float = 0.1,
    options: Options = FINE,
    granularity: str | int = "layer",
    forward: Forward | None = None,
) -> Measurement:
    """Measure by both methods and compare with the truth; 8 bits change little: the second order tells nearly all."""
    for method in ("direct", "fisher"):
        measurement = measure(model, data, options, method=method, loss=loss, granularity=granularity, forward=forward)
        true = true_costs(model, data, measurement, loss, forward)
        np.testing.assert_allclose(measurement.cost, true, rtol=rtol, atol=1e-4 * true.max(), err_msg=method)
    return measurement


class Hidden(nn.Module):
    """Two layers with a step in between that autograd does not see, beside a path that it sees."""

    def __init__(self, step: Callable[[Tensor], Tensor], *, residual: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.step, self.residual = step, residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        hidden = self.step(self.second(x))
        return self.last(x + hidden if self.residual else hidden)


@torch.no_grad()
def without_gradient(x: Tensor) -> Tensor:
    return torch.tanh(x)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": without_gradient,
    "detach": lambda x: torch.tanh(x.detach()),
    "inference mode": torch.inference_mode()(without_gradient),
    "round": lambda x: torch.round(8 * x) / 8,
    "numpy": lambda x: torch.from_numpy(np.tanh(x.detach().numpy())),
    "numpy, refused with gradients": lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "sign": lambda x: torch.sign(x) * torch.tanh(x).abs().detach(),
}


ALL_TRIED = "numpy, refused with gradients"  # the pass with gradients fails


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_without_gradient_is_seen_and_the_layers_before_it_are_tried(step: str, residual: bool) -> None:
    model = seeded(lambda: Hidden(STEPS[step], residual=residual))
    measurement = assert_true(model, [inputs(32, 6), inputs(16, 6, seed=2)])
    assert "second" in measurement.tried
    assert ("last" in measurement.tried) == (step == ALL_TRIED)


def test_a_step_without_gradient_in_a_later_batch_only_is_seen() -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            return self.last(hidden.detach() if float(x[0, 0].detach()) > 5 else hidden)

    later = inputs(16, 6, seed=2)
    later[0, 0] = 6
    assert set(assert_true(seeded(Later), [inputs(16, 6), later]).tried) == {"first"}


def test_networks_that_autograd_sees_as_a_whole_are_not_tried() -> None:
    model = seeded(lambda: Hidden(torch.relu, residual=True))
    assert not assert_true(model, [inputs(32, 6)]).tried


class HeadOfWeights(nn.Module):
    """The embedding's weight is the head too, by a product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.mix = nn.Embedding(2000, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.e.weight *= 0.2

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.e(ids)).mean(1) @ self.e.weight.T


@pytest.mark.parametrize("factory", [HeadOfWeights, Functional])
def test_a_weight_used_outside_its_layer_is_tried(factory: Callable[[], nn.Module]) -> None:
    model = seeded(factory)
    name, weight = next(model.named_parameters())
    measurement = assert_true(model, [words(len(weight), 64, 3)], loss="kl", rtol=0.5)  # kl of many outputs: by probes
    assert set(measurement.tried) == {name.removesuffix(".weight")}
    assert "outside" in next(iter(measurement.tried.values()))


def test_layers_of_tiny_weights_and_gradients_scaled_by_frequency_are_no_false_alarms() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(9, 6, scale_grad_by_freq=True)
            self.s = nn.Embedding(9, 6, sparse=True)
            self.mix, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
            with torch.no_grad():
                self.mix.weight *= 1e-12
                self.mix.bias.fill_(1e-12)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last((self.e(ids) + self.s(ids) + self.mix(self.e(ids))).mean(1))

    assert not measure(seeded(Scaled), [words(9, 8, 5)], FINE, loss="mse").tried


class TimeMajor(nn.Module):
    """Time before samples inside, as ``batch_first=False`` has it; each step has a weight of its own in the end."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x.transpose(0, 1)))
        x = self.mix(x.flatten(0, 1)).view_as(x) if self.flat else self.mix(x)
        return self.head(torch.tanh(x.cumsum(0)).mean(0))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("samples", "steps"), [(4, 8), (4, 4), (5, 7), (8, 4), (1, 6)])
def test_samples_are_found_where_time_comes_first(samples: int, steps: int, flat: bool) -> None:
    model = seeded(lambda: TimeMajor(flat=flat))
    assert not assert_true(model, [inputs(samples, steps, 3)]).tried


def test_tokens_gathered_from_all_samples_have_an_owner_each() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            route = (tokens[:, 0] * 10).long() % 3
            out = torch.zeros_like(tokens)
            for index, expert in enumerate(self.experts):
                chosen = (route == index).nonzero().flatten()
                out = out.index_add(0, chosen, expert(tokens[chosen]))
            return self.head(torch.tanh(out).view_as(x).mean(1))

    data = [inputs(12, 5, 6), inputs(7, 5, 6, seed=2)]
    assert not assert_true(seeded(Experts), data).tried
    assert not assert_true(seeded(Experts), data, granularity=2).tried


def test_statistics_over_the_batch_couple_samples_and_are_tried() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head((x - x.mean(0)) / x.std(0))

    model = seeded(Coupled)
    assert set(assert_true(model, [inputs(16, 6), inputs(16, 6, seed=2)]).tried) == {"first"}


class Positions(nn.Module):
    """A position embedding whose output, ``(1, T, d)`` or ``(T, d)``, all samples share."""

    def __init__(self, *, leading: bool) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(8, 6), nn.Linear(6, 4)
        self.leading = leading

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.positions(places[None] if self.leading else places)
        return self.head(torch.tanh(x)).mean(1)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 4, 5])
def test_position_embeddings_that_all_samples_share_work(samples: int, leading: bool) -> None:
    model = seeded(lambda: Positions(leading=leading))
    measurement = assert_true(model, [words(11, samples, 4)])
    assert set(measurement.tried) == (set() if samples == 1 else {"positions"})


def test_blocks_of_a_weight_shared_by_unlike_layers_are_tried() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(4, 4, 3, bias=False), nn.ConvTranspose2d(4, 4, 3, bias=False)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.down(x))).mean((2, 3))

    model, data = seeded(Autoencoder), [inputs(8, 4, 6, 6)]
    assert not assert_true(model, data).tried
    assert set(assert_true(model, data, granularity=2).tried) == {"down[0:2]", "down[2:4]"}


class Doubled(nn.Linear):
    """A subclass whose output is another than that of its base."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(super().forward(x)) * 2


class Pair(nn.Linear):
    """A layer that returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(x), 1


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.head(torch.relu(hidden[0] if isinstance(hidden, tuple) else hidden))


def test_layers_that_return_tuples_or_compute_otherwise_are_measured_as_they_are() -> None:
    data = [inputs(16, 6)]
    assert set(assert_true(seeded(lambda: Holder(Pair(6, 6))), data).tried) == {"layer"}
    assert not assert_true(seeded(lambda: Holder(Doubled(6, 6))), data).tried
    blocks = assert_true(seeded(lambda: Holder(Doubled(6, 6))), data, granularity=3)
    assert set(blocks.tried) == {"layer[0:3]", "layer[3:6]"}


def test_hooks_of_a_layer_are_part_of_the_model() -> None:
    model = seeded(lambda: Holder(nn.Linear(6, 6)))
    model.layer.register_forward_hook(lambda module, args, output: 3 * torch.tanh(output) + 1)
    model.layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert not assert_true(model, [inputs(16, 6)]).tried


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast_inference_mode_and_compiled_blocks_are_measured_as_they_run(where: str) -> None:
    model, data = seeded(lambda: Holder(nn.Linear(6, 6))), [inputs(16, 6)]

    def cast(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    def inferred(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(batch)

    if where == "inside":
        model.layer = torch.compile(model.layer, backend="eager")
        assert [part.name for part in assert_true(model, data).parts] == ["layer._orig_mod", "head"]
        return
    coarse = prune_quantize(bits=(3,), sparsity=(0,))  # a change that bfloat16 shows
    assert_true(model, data, options=coarse, rtol=0.5, forward=cast)
    assert set(assert_true(model, data, forward=inferred).tried) == {"layer", "head"}


class Similar(nn.Module):
    """One number per sample: the cosine of two encodings, or a regression, without a further dimension."""

    def __init__(self, *, siamese: bool) -> None:
        super().__init__()
        self.siamese = siamese
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 6 if siamese else 1)

    def forward(self, x: Tensor) -> Tensor:
        encoded, other = (self.last(torch.tanh(self.first(value))) for value in (x, x.flip(1)))
        return torch.cosine_similarity(encoded, other, dim=1) if self.siamese else encoded.squeeze(1)


@pytest.mark.parametrize("siamese", [True, False])
@pytest.mark.parametrize("granularity", ["layer", 4])
@pytest.mark.usefixtures("estimates_alone")
def test_one_number_per_sample_needs_no_further_dimension(siamese: bool, granularity: str | int) -> None:
    torch.manual_seed(0)
    model, data = Similar(siamese=siamese).eval(), [inputs(16, 5), inputs(9, 5, seed=2)]
    measurement = assert_true(model, data, granularity=granularity)
    sampled = measure(model, data, FINE, method="sampled", loss="mse", granularity=granularity)
    off = sampled.cost - measurement.cost
    assert (abs(off) <= 4 * sampled.standard_error + 0.1 * measurement.cost).all()  # 8 bits: nearly of second order
