"""Low rank: the closest product of factors, as real smaller layers that behave as the dense layer would."""

import copy

import pytest
import torch
from torch import Tensor, nn

from qcompress import layers
from qcompress.errors import ModelError, OptionsError
from qcompress.factored import FactoredConv2d, FactoredLinear, factored, fold_, replace_
from qcompress.transforms.base import Target
from qcompress.transforms.low_rank import LowRank


def target_of(rows: Tensor, layer: str = "Linear") -> Target:
    return Target(layer=layer, channels=rows.shape[0], per_channel=rows.shape[1], dtype=rows.dtype, macs=rows.numel())


def random_rows(channels: int, per_channel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(channels, per_channel, generator=torch.Generator().manual_seed(channels + per_channel)).to(dtype)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (2, 50), (50, 2)])
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.95])
def test_no_product_of_that_rank_is_closer(shape: tuple[int, int], ratio: float) -> None:
    rows, transform = random_rows(*shape), LowRank(ratio)
    target = target_of(rows)
    rank = transform.rank(target)
    if rank < 1:
        assert transform.why_not(target)
        return
    tail = torch.linalg.svdvals(rows.double())[rank:].square().sum()
    error = (transform.approximate(rows, target).double() - rows.double()).square().sum()
    # the product is rounded to float32: relative 1e-7 of the weight itself
    assert abs(float(error - tail)) <= 1e-5 * float(tail) + 1e-10 * float(rows.double().square().sum())


def test_a_weight_of_low_rank_is_exact() -> None:
    rows = random_rows(30, 2) @ random_rows(2, 40)
    found = LowRank(0.2).approximate(rows, target_of(rows))
    assert torch.allclose(found, rows, rtol=0, atol=1e-5 * float(rows.abs().max()))


def test_zeros_stay_zeros() -> None:
    rows = torch.zeros(10, 10)
    assert torch.equal(LowRank(0.5).approximate(rows, target_of(rows)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_factors_take_the_predicted_bytes_and_give_the_approximation(dtype: torch.dtype) -> None:
    rows, transform = random_rows(24, 36, dtype), LowRank(0.5)
    target = target_of(rows)
    stored = transform.encode(rows)
    assert stored["reduce"].shape == (transform.rank(target), 36)
    assert stored["expand"].shape == (24, transform.rank(target))
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in stored.values())
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == transform.size_bytes(target)
    assert transform.size_bytes(target) < rows.numel() * rows.element_size()
    decoded = transform.decode(stored, target)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, transform.approximate(rows, target))


def test_several_ratios_of_one_weight_do_not_disturb_another_weight() -> None:
    first, second = random_rows(20, 20), random_rows(20, 20) + 1
    alone = LowRank(0.5).approximate(second, target_of(second))
    for ratio in (0.2, 0.5, 0.8):
        LowRank(ratio).approximate(first, target_of(first))
    assert torch.equal(LowRank(0.5).approximate(second, target_of(second)), alone)
    first.add_(1)  # the same tensor object, other values
    assert torch.equal(LowRank(0.5).approximate(first, target_of(first)), alone)


def test_macs_are_those_of_the_two_layers() -> None:
    target = Target(layer="Conv2d", channels=32, per_channel=90, dtype=torch.float32, macs=32 * 90 * 49)
    transform = LowRank(0.5)
    assert transform.macs(target) == transform.rank(target) * (32 + 90) * 49


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": "Embedding"}, "only Linear and Conv2d"),
        ({"whole": False}, "cannot be replaced"),
        ({"replaceable": False}, "cannot be replaced"),
        ({"channels": 1}, "rank 1 already takes more"),
    ],
)
def test_where_it_does_not_fit_it_says_why(change: dict[str, object], reason: str) -> None:
    fields = {"layer": "Linear", "channels": 30, "per_channel": 30, "dtype": torch.float32, "macs": 900.0} | change
    assert reason in LowRank(0.5).why_not(Target(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 2, float("nan"), "half", None])
def test_ratios_outside_0_to_1_are_refused(ratio: object) -> None:
    with pytest.raises(OptionsError, match="above 0 and below 1"):
        LowRank(ratio)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="NaN"):
        LowRank(0.5).encode(torch.full((4, 4), torch.nan))


LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (5, 12)),
    "linear without bias, of tokens": (lambda: nn.Linear(20, 12, bias=False), (2, 3, 20)),
    "conv": (lambda: nn.Conv2d(4, 16, 3, padding=1), (2, 4, 7, 7)),
    "conv 1x1": (lambda: nn.Conv2d(16, 12, 1, bias=False), (2, 16, 5, 5)),
    "conv stride dilation": (lambda: nn.Conv2d(4, 16, (3, 2), stride=(2, 1), dilation=2, padding=3), (2, 4, 9, 9)),
    "conv same reflect": (lambda: nn.Conv2d(4, 16, 3, padding="same", padding_mode="reflect"), (2, 4, 7, 7)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


@pytest.mark.parametrize("ratio", [0.15, 0.6])
def test_the_two_layers_compute_what_the_dense_layer_with_their_product_does(
    layer_and_input: tuple[nn.Module, Tensor], ratio: float
) -> None:
    layer, x = layer_and_input
    weight = layers.weight_of(layer)
    rows, transform = layers.to_rows(layer, weight.detach()), LowRank(ratio)
    target = target_of(rows, type(layer).__name__)
    assert not transform.why_not(target)
    stored = transform.encode(rows)
    small = factored(layer, transform.factors(stored, target))
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        layers.weight_of(dense).copy_(layers.from_rows(layer, transform.decode(stored, target), weight.shape))
    # float32 sums in another order: a few units in the last place of numbers of size 1
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)
    folded = small.to_dense()
    torch.testing.assert_close(folded(x), dense(x), rtol=1e-4, atol=1e-5)
    assert {name: value.shape for name, value in folded.state_dict().items()} == {
        name: value.shape for name, value in layer.state_dict().items()
    }
    assert str(folded) == str(layer)


def test_a_factored_layer_in_half_precision_runs_in_half_precision() -> None:
    layer = nn.Linear(32, 32, dtype=torch.bfloat16)
    rows = layer.weight.detach()
    small = factored(layer, LowRank(0.5).factors(LowRank(0.5).encode(rows), target_of(rows)))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def two_factors(layer: nn.Module) -> tuple[Tensor, ...]:
    rows = layers.to_rows(layer, layers.weight_of(layer).detach())
    return LowRank(0.5).factors(LowRank(0.5).encode(rows), target_of(rows))


def test_factoring_keeps_bias_mode_and_gradients_and_draws_no_random_numbers() -> None:
    layer = nn.Conv2d(8, 8, 3).eval()
    layer.weight.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small = factored(layer, two_factors(layer))
    assert torch.equal(torch.rand(1), expected)
    assert small.expand.bias is layer.bias
    assert not small.training
    assert not small.reduce.training
    assert not small.reduce.weight.requires_grad
    assert small.expand.bias.requires_grad


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 8, 3, groups=2), nn.Conv1d(8, 8, 3), nn.Embedding(8, 8)])
def test_only_linear_and_plain_conv2d_are_factored(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="can be factored"):
        factored(layer, (torch.ones(2, 8), torch.ones(8, 2)))


class Reused(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.Sequential(self.first, nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](torch.relu(self.first(x)))


def test_a_layer_under_several_names_is_replaced_under_all_and_folded_back() -> None:
    model = Reused()
    original = copy.deepcopy(model.state_dict())
    for old in (model.first, model.inner[1]):
        replace_(model, old, factored(old, two_factors(old)))
    assert isinstance(model.first, FactoredLinear)
    assert model.inner[0] is model.first
    assert isinstance(model.inner[1], FactoredConv2d)
    assert "inner.1.reduce.weight" in model.state_dict()
    copied = copy.deepcopy(model)
    assert copied.inner[0] is copied.first
    assert copied.first is not model.first
    x = torch.randn(3, 8)
    assert torch.equal(copied(x), model(x))
    fold_(model)
    assert isinstance(model.first, nn.Linear)
    assert model.inner[0] is model.first
    model.load_state_dict(original)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_a_factored_model_is_exported() -> None:
    model = Reused().eval()
    replace_(model, model.first, factored(model.first, two_factors(model.first)))
    x = torch.randn(3, 8)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
