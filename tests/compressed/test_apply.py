"""Applying: every part becomes what its option says, nothing else changes, and the original weights undo it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from qcompress.compressed.apply import apply, apply_
from qcompress.compressed.factored import FactoredConv2d, FactoredLinear, fold_
from qcompress.compressed.record import record_of
from qcompress.errors import DataError, ModelError
from qcompress.model.batch_norm import reestimate_
from qcompress.options import low_rank, prune_quantize
from qcompress.transforms.base import Keep, Weight
from tests.measurements import KINDS, Chain, Mixed, measured, option_like, solution
from tests.models import Reused, TiedLanguageModel

OPTIONS = prune_quantize(bits=(3, 8), sparsity=(0, 0.5)) + low_rank(
    ratios=(0.4, 0.7), kinds=("channels",), whitened=False
)


def made(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, batch = KINDS[kind]
    return make().eval(), batch()


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("granularity", ["layer", 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_becomes_its_option_and_nothing_else_changes(kind: str, granularity: str | int) -> None:
    model, batch = made(kind)
    before = copy.deepcopy(model)
    measurement = measured(model, batch, OPTIONS, granularity)
    choice = [(3 * place + 1) % len(own) for place, own in enumerate(measurement.transforms)]
    choice = [
        0 if own[option].kind == "low_rank" else option
        for own, option in zip(measurement.transforms, choice, strict=True)
    ]
    smaller = apply(model, measurement, solution(choice))
    assert same_state(model, before)
    assert record_of(model) is None
    changed = {id(model.get_submodule(path).weight) for part in measurement.parts for path in part.modules}
    for part, own, option in zip(measurement.parts, measurement.transforms, choice, strict=True):
        expected = own[option].approximate(Weight(part.weight(model), part.target))
        assert torch.equal(part.weight(smaller), expected)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in changed:
            assert torch.equal(smaller.state_dict()[name], tensor)
    assert bool(torch.isfinite(smaller(batch)).all())


def test_tied_and_reused_modules_stay_one() -> None:
    for make, batch in ((TiedLanguageModel, torch.randint(11, (3, 5))), (Reused, torch.randn(4, 5))):
        torch.manual_seed(0)
        model = make()
        measurement = measured(model, batch, OPTIONS)
        smaller = apply(model, measurement, solution([1] * len(measurement.parts)))
        if isinstance(smaller, TiedLanguageModel):
            assert smaller.head.weight is smaller.embed.weight
        if isinstance(smaller, Reused):
            assert smaller.again is smaller.first


def test_low_rank_puts_two_layers_everywhere_the_layer_was() -> None:
    model, batch = made("reused")
    measurement = measured(model, batch, low_rank(ratios=(0.7,), whitened=False))
    smaller = apply(model, measurement, solution(option_like(measurement, "low_rank")))
    assert isinstance(smaller, Reused)
    assert isinstance(smaller.first, FactoredLinear)
    assert smaller.again is smaller.first
    dense = fold_(copy.deepcopy(smaller))
    torch.testing.assert_close(smaller(batch), dense(batch), rtol=1e-4, atol=1e-5)


def test_a_shared_or_grouped_layer_is_not_offered_low_rank() -> None:
    for kind, expected in (("tied", {"mix"}), ("mixed", {"stem", "wide", "fc"})):
        model, batch = made(kind)
        found = measured(model, batch, OPTIONS)
        named = zip(found.parts, found.transforms, strict=True)
        assert {part.name for part, own in named if own[-1].kind == "low_rank"} == expected


def test_a_model_that_is_one_layer_keeps_its_place() -> None:
    model = nn.Linear(16, 16)
    measurement = measured(model, torch.randn(2, 16), OPTIONS)
    assert all(transform.kind != "low_rank" for transform in measurement.transforms[0])
    smaller = apply(model, measurement, solution([1]))
    assert not torch.equal(smaller.weight, model.weight)


def test_loading_the_original_state_undoes_it() -> None:
    model, batch = made("mixed")
    original = copy.deepcopy(model.state_dict())
    measurement = measured(model, batch, OPTIONS)
    assert apply_(model, measurement, solution([1] * len(measurement.parts))) is model
    assert not torch.equal(model.state_dict()["fc.weight"], original["fc.weight"])
    model.load_state_dict(original)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert apply_(model, measurement, solution([2] * len(measurement.parts))) is model  # and it can be applied again


def test_folding_then_loading_the_original_state_undoes_low_rank() -> None:
    model, batch = made("mixed")
    expected, original = model(batch), copy.deepcopy(model.state_dict())
    measurement = measured(model, batch, OPTIONS)
    apply_(model, measurement, solution(option_like(measurement, "low_rank")))
    assert isinstance(model, Mixed)
    assert isinstance(model.wide, FactoredConv2d)
    fold_(model).load_state_dict(original)
    assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16)).to(dtype)
    measurement = measured(model, torch.randn(4, 16, dtype=dtype), OPTIONS)
    smaller = apply(model, measurement, solution([1, option_like(measurement, "low_rank")[1]]))
    assert {tensor.dtype for tensor in smaller.state_dict().values()} == {dtype}
    assert isinstance(smaller.layers[1], FactoredLinear)


def test_the_record_goes_with_copies() -> None:
    model, batch = made("linear")
    measurement = measured(model, batch, OPTIONS)
    smaller = copy.deepcopy(apply(model, measurement, solution([1, 0])))
    record = record_of(smaller)
    assert record is not None
    assert [item.transform for item in record.parts] == [measurement.transforms[0][1], Keep()]


def test_another_model_than_measured_is_refused() -> None:
    model, batch = made("linear")
    measurement = measured(model, batch, OPTIONS)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ModelError, match="not the model that was measured"):
        apply(model, measurement, solution([0, 0]))


def test_a_compressed_model_is_not_compressed_twice() -> None:
    model, batch = made("linear")
    measurement = measured(model, batch, OPTIONS)
    smaller = apply(model, measurement, solution([1, 1]))
    with pytest.raises(ModelError, match="not the model that was measured"):
        apply_(smaller, measurement, solution([1, 1]))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (None, "holds no choice"),
        ([0], "chooses for 1 groups, the measurement has 2 parts"),
        ([0, 0, 0], "chooses for 3 groups"),
        ([0, 99], r"option 99 for 'layers\.2'"),
        ([-1, 0], r"option -1 for 'layers\.0'"),
    ],
)
def test_a_solution_of_another_problem_is_refused(choice: list[int] | None, message: str) -> None:
    model, batch = made("linear")
    measurement = measured(model, batch, OPTIONS)
    with pytest.raises(ModelError, match=message):
        apply(model, measurement, solution(choice))


def test_weights_that_are_not_finite_are_named_and_nothing_is_changed() -> None:
    model, batch = made("linear")
    measurement = measured(model, batch, OPTIONS)
    with torch.no_grad():
        model.get_submodule("layers.2").weight[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measurement = replace(measurement, model_fingerprint=measurement.fingerprint_of(model))
    with pytest.raises(ModelError, match=r"cannot compress 'layers\.2'.*NaN"):
        apply_(model, measurement, solution([1, 1]))
    assert torch.equal(model.state_dict()["layers.0.weight"], before["layers.0.weight"])
    with pytest.raises(ModelError, match=r"'layers\.2' \(Linear\) holds NaN"):
        measured(model, batch, OPTIONS)


def test_batch_norm_statistics_become_the_averages_over_the_batches() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, track_running_stats=False)
    )
    model[3].eval()
    batches = [torch.randn(8, 3) for _ in range(3)]
    with torch.no_grad():
        means = [model[0](batch).mean(0) for batch in batches]
        variances = [model[0](batch).var(0) for batch in batches]
    weights = [parameter.clone() for parameter in model.parameters()]
    reestimate_(model, batches)
    torch.testing.assert_close(model[1].running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack(variances).mean(0))
    assert [module.training for module in model] == [True, True, True, False]
    assert model[1].momentum == 0.1
    assert all(map(torch.equal, weights, model.parameters()))


def test_applying_can_reestimate_batch_norm() -> None:
    model, batch = made("mixed")
    measurement = measured(model, batch, OPTIONS)
    choice = solution([1] * len(measurement.parts))
    smaller = apply(model, measurement, choice, batch_norm_data=[(batch, None)])
    expected = apply(model, measurement, choice)
    reestimate_(expected, [batch], forward=lambda net, data: net(data))
    assert same_state(smaller, expected)
    assert not torch.equal(smaller.state_dict()["norm.running_mean"], model.state_dict()["norm.running_mean"])


def test_the_copy_evaluates_and_a_model_compressed_in_place_keeps_its_mode() -> None:
    model, batch = made("mixed")
    model.train()
    measurement = measured(model, batch, OPTIONS)
    choice = solution([1] * len(measurement.parts))
    assert not any(module.training for module in apply(model, measurement, choice).modules())
    assert all(module.training for module in model.modules())
    assert all(module.training for module in apply_(model, measurement, choice).modules())


@pytest.mark.parametrize(("data", "error"), [([], DataError), ([torch.full((4, 3), torch.nan)], ModelError)])
def test_failed_reestimation_puts_the_old_statistics_back(data: list[torch.Tensor], error: type[Exception]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_mean.fill_(0.5)
    before = copy.deepcopy(model)
    with pytest.raises(error):
        reestimate_(model, data)
    assert same_state(model, before)
    assert not model[1].training


def test_a_model_without_batch_norm_is_left_alone() -> None:
    model = nn.Linear(3, 4)
    before = copy.deepcopy(model)
    reestimate_(model, [torch.randn(2, 3)])
    assert same_state(model, before)


@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_layer_with_a_fused_kernel_runs_on_the_factors(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, batch = nn.Sequential(encoder, nn.Flatten(), nn.Linear(96, 4)).eval(), torch.randn(8, 6, 16)
    measurement = measured(model, batch, low_rank(ratios=(0.3,), kinds=("channels",), whitened=False))
    small = apply(model, measurement, solution([len(options) - 1 for options in measurement.transforms]))
    layer = small[0].linear1
    assert type(layer) is FactoredLinear
    called = []

    def forward(x: torch.Tensor) -> torch.Tensor:  # no hook: hooks forbid the fused kernel
        called.append(x)
        return nn.functional.linear(x, layer.reduce.weight)

    monkeypatch.setattr(layer.reduce, "forward", forward)
    with torch.set_grad_enabled(grad):
        output = small(batch)
    assert len(called) == 1
    monkeypatch.undo()
    dense = fold_(copy.deepcopy(small))
    assert torch.equal(layer.weight, dense[0].linear1.weight)
    assert torch.equal(layer.bias, dense[0].linear1.bias)
    torch.testing.assert_close(output, dense(batch))  # float32, added up in another order
