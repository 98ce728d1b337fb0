"""Weights and activations in 8 bits: what is rounded, in the model and in every way of measuring."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.options import transform_from_json
from qcompress.proposals import feasible_settings
from qcompress.transforms.activations import Activations, Range
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.quantize.integer import IntegerProduct
from tests.measurements import Chain, option_like, solution

FLOAT = 1e-6


class Small(nn.Module):
    """A convolution that ReLU reads, a depthwise one, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.conv(x)))
        return self.out(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(3)]


def by_hand(model: nn.Module, measurement: Measurement, x: Tensor) -> Tensor:
    """The model with every layer's product in whole numbers, from the ranges and codes alone."""
    layers = {}
    for index, (part, options) in enumerate(zip(measurement.parts, measurement.transforms, strict=True)):
        transform = next(own for own in options if own.kind == "integer_product")
        assert isinstance(transform, IntegerProduct)
        stored = measurement.codes[index, options.index(transform)]
        layers[part.name] = transform, transform.decode(stored, part.target)

    def codes(values: Tensor, ends: tuple[float, float]) -> Tensor:
        span = Range(*ends)
        return torch.clamp(torch.round(values / span.step) + span.zero, 0, 255)

    def rounded(values: Tensor, ends: tuple[float, float]) -> Tensor:
        span = Range(*ends)
        return (codes(values, ends) - span.zero) * span.step

    def product(name: str, values: Tensor) -> Tensor:
        transform, rows = layers[name]
        module = model.get_submodule(name)
        weight = rows.reshape(module.weight.shape)  # type: ignore[operator,union-attr]
        given = rounded(values, transform.inputs) if transform.inputs else values
        if isinstance(module, nn.Linear):
            return nn.functional.linear(given, weight, module.bias)
        assert isinstance(module, nn.Conv2d)
        assert transform.outputs is not None
        out = nn.functional.conv2d(given, weight, module.bias, module.stride, module.padding, 1, module.groups)
        return rounded(out, transform.outputs)

    x = product("depthwise", torch.relu(product("conv", x)))
    return product("out", torch.relu(product("hidden", x.mean((2, 3)))))


def test_a_compressed_model_gives_what_products_of_codes_give(model: nn.Module, data: list[Tensor]) -> None:
    measurement = qcompress.measure(model, data, qcompress.integer_products(("static",)))
    smaller = qcompress.apply(model, measurement, solution(option_like(measurement, "integer_product")))
    with torch.no_grad():
        expected = by_hand(model, measurement, data[0])
        torch.testing.assert_close(smaller(data[0]), expected, atol=FLOAT, rtol=0)
        assert float((expected - model(data[0])).abs().max()) > 100 * FLOAT


def test_costs_are_those_of_trying_by_every_method(model: nn.Module, data: list[Tensor]) -> None:
    options = qcompress.integer_products() + qcompress.prune_quantize(bits=(8,), sparsity=(0,))
    tried = qcompress.measure(model, data, options, method="direct")
    expected = []
    for part, own in enumerate(tried.transforms):
        for option in range(len(own)):
            choice = [0] * len(tried.parts)
            choice[part] = option
            expected.append(qcompress.mean_loss(model, qcompress.apply(model, tried, solution(choice)), data))
    torch.testing.assert_close(
        torch.tensor(tried.cost), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-3
    )
    linearised = qcompress.measure(model, data, options, method="fisher")
    assert linearised.labels == tried.labels
    torch.testing.assert_close(torch.tensor(linearised.cost), torch.tensor(tried.cost), atol=1e-9, rtol=0.1)
    sampled = qcompress.measure(model, data, options, method="sampled")  # estimates from 48 samples, one probe each
    torch.testing.assert_close(torch.tensor(sampled.cost), torch.tensor(tried.cost), atol=1e-8, rtol=0.7)


def test_weights_of_7_bits_are_for_convolutions_that_read_several_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).eval()
    options = qcompress.integer_products(bits=(8, 7))
    measurement = qcompress.measure(model, [torch.randn(8, 3, 8, 8)], options)
    narrow = "7 bits, activations in 8 bits"
    assert [narrow in labels for labels in measurement.labels] == [True, False, False]
    problem = qcompress.formulate(measurement, {"bytes": 1.0})
    setting = feasible_settings(measurement, problem)[f"uniform: {narrow}"].choice.tolist()
    chosen = [labels[option] for labels, option in zip(measurement.labels, setting, strict=True)]
    assert chosen == [narrow, "8 bits, activations in 8 bits", "8 bits, activations in 8 bits"]
    for wrong in ({"bits": (6,)}, {"bits": ()}, {"bits": (7,), "ranges": ("dynamic",)}):
        with pytest.raises(OptionsError, match="bits"):
            qcompress.integer_products(**wrong)  # type: ignore[arg-type]


def test_rounding_activations_costs_more_than_the_weights_alone(model: nn.Module, data: list[Tensor]) -> None:
    options = qcompress.integer_products(("static",)) + qcompress.prune_quantize(bits=(8,), sparsity=(0,))
    measurement = qcompress.measure(model, data, options, method="direct")
    costs = dict(zip([label for own in measurement.labels[:1] for label in own], measurement.cost, strict=False))
    assert costs["8 bits, activations in 8 bits"] > costs["8 bits"] > 0


def test_every_choice_is_tried_with_its_own_rounding(model: nn.Module, data: list[Tensor]) -> None:
    measurement = qcompress.measure(model, data, qcompress.integer_products())
    whole, none = option_like(measurement, "integer_product"), [0] * len(measurement.parts)
    true_loss = qcompress.TrueLoss(model, measurement, data)
    first = true_loss(whole)
    assert first == pytest.approx(
        qcompress.mean_loss(model, qcompress.apply(model, measurement, solution(whole)), data), rel=1e-4
    )
    assert true_loss(none) == 0
    assert true_loss(whole) == first


def test_files_copies_and_packed_models_round_alike(model: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    measurement = qcompress.measure(model, data, qcompress.integer_products())
    smaller = qcompress.apply(model, measurement, solution(option_like(measurement, "integer_product")))
    qcompress.save_compressed(smaller, tmp_path / "small")
    loaded = qcompress.load_compressed(tmp_path / "small", lambda: copy.deepcopy(model))
    packed = qcompress.pack_(copy.deepcopy(smaller))
    measurement.save(tmp_path / "measurement.npz")
    again = Measurement.load(tmp_path / "measurement.npz")
    assert again.transforms == measurement.transforms
    with torch.no_grad():
        for other in (loaded, copy.deepcopy(smaller)):
            assert torch.equal(other(data[0]), smaller(data[0]))
        torch.testing.assert_close(packed(data[0]), smaller(data[0]), atol=FLOAT, rtol=0)


def test_what_is_undone_rounds_no_longer(model: nn.Module, data: list[Tensor]) -> None:
    measurement, state = qcompress.measure(model, data, qcompress.integer_products()), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(data[0])
        qcompress.apply_(model, measurement, solution(option_like(measurement, "integer_product")))
        assert not torch.equal(model(data[0]), before)
        qcompress.fold_(model).load_state_dict(state)
        assert torch.equal(model(data[0]), before)


def test_training_goes_through_the_rounding(model: nn.Module, data: list[Tensor]) -> None:
    measurement = qcompress.measure(model, data, qcompress.integer_products(("static",)))
    smaller = qcompress.apply(model, measurement, solution(option_like(measurement, "integer_product")))
    smaller(data[0]).sum().backward()
    assert all(bool(module.weight.grad.any()) for module in (smaller.conv, smaller.hidden))  # type: ignore[union-attr,operator]


def test_numbers_beyond_the_range_become_its_ends_and_zero_stays_zero() -> None:
    span = Range(-1.0, 2.0)
    values = torch.tensor([-5.0, -1.0, 0.0, 1e-9, 2.0, 5.0])
    found = span.rounded(values)
    assert found[2] == 0
    assert float((found[1:5] - values[1:5]).abs().max()) <= span.step / 2 * 1.01
    assert found[0] == found[1]
    assert found[5] == found[4]
    assert torch.equal(span.rounded(found), found)


def test_dynamic_ranges_are_those_of_the_tensor() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0]])
    (args, _) = Activations(None, None).before((values,), {})
    torch.testing.assert_close(args[0], Range(0.0, 4.0).rounded(values))


def test_options_name_what_they_need_and_survive_json() -> None:
    option = IntegerProduct(inputs=(-1.0, 2.5), outputs=(0.0, 3.0))
    assert transform_from_json(option.to_json()) == option
    assert transform_from_json(IntegerProduct(dynamic=True).to_json()) == IntegerProduct(dynamic=True)
    with pytest.raises(OptionsError, match="has no range yet"):
        _ = IntegerProduct().activations
    with pytest.raises(OptionsError, match="must be a range that contains 0"):
        IntegerProduct(inputs=(1.0, 2.0))
    with pytest.raises(OptionsError, match="'static' and 'dynamic', found 'both'"):
        qcompress.integer_products(("both",))


def test_layers_whose_inputs_are_not_known_have_no_such_option() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Embedding(20, 32), nn.Linear(32, 32)).eval()
    measurement = qcompress.measure(model, [torch.randint(20, (4, 5))], qcompress.integer_products(), loss="mse")
    assert [len(own) for own in measurement.labels] == [1, 3]
    target = Target(layer="Linear", channels=8, per_channel=64, dtype=torch.float32, macs=1, whole=False)
    weight = Weight(torch.ones(8, 64), target, ranges=((0.0, 1.0), (0.0, 1.0)))
    assert IntegerProduct().resolve(weight) is None


def test_measuring_again_around_a_choice_is_refused(model: nn.Module, data: list[Tensor]) -> None:
    measurement = qcompress.measure(model, data, qcompress.integer_products())
    with pytest.raises(OptionsError, match="leave integer_products"):
        qcompress.remeasure(model, data, measurement, [0] * len(measurement.parts))
