"""Data, models and arguments of a kind that does not work are refused by name; sparse inputs of a layer work."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    Options,
    compress,
    finetune,
    formulate,
    integer_products,
    low_rank,
    mean_loss,
    measure,
    prune_channels,
    prune_quantize,
    refine,
    remeasure,
    solve,
    time_options,
)
from qcompress.cautions import of_prediction
from qcompress.errors import ArtefactError, DataError, ModelError, NotFiniteError, OptionsError
from qcompress.model.forward import described
from solvers import InvalidOptionError

BITS = prune_quantize(bits=(4,), sparsity=(0,))
BUDGET: dict[str, Any] = {"budget": {"bytes": 0.6}, "time_limit": 2}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(count: int = 4, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("options", [BITS, prune_channels()])
def test_a_later_batch_that_does_not_fit_is_named(options: Options) -> None:
    data = [*inputs(2), *inputs(1, width=5)]
    with pytest.raises(DataError, match=r"the model does not accept batch 3 of the data \(a tensor of shape \(8, 5\)"):
        measure(network(), data, options)
    with pytest.raises(DataError, match=r"the model does not accept batch 3 of the data"):
        compress(network(), data, options=options, **BUDGET)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_batch_is_described() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(4, 6)])
    assert described(nested) == "a tensor of shape (2, nested)"
    assert described({"x": nested, "n": 1}) == "a dict of x (2, nested), n int"
    with pytest.raises(DataError, match=r"does not accept the first batch \(a tensor of shape \(2, nested\)\)"):
        compress(network(), [nested], **BUDGET)


def test_outputs_that_are_not_finite_name_the_batch() -> None:
    wrong = inputs(1)[0].index_fill(0, torch.tensor(0), torch.nan)
    with pytest.raises(NotFiniteError, match=r"^validation: .* for a batch \(a tensor of shape \(8, 6\)\) holds NaN"):
        compress(network(), inputs(), validation=[wrong], **BUDGET)
    with pytest.raises(NotFiniteError, match=r"^the model's output for a batch \(a tensor of shape \(8, 6\)\) holds"):
        measure(network(), [wrong], BITS)


def test_an_exported_module_is_refused_as_such() -> None:
    exported = torch.export.export(network(), (inputs()[0],)).module()
    for call in (
        lambda: compress(exported, inputs(), **BUDGET),
        lambda: measure(exported, inputs(), BITS),
    ):
        with pytest.raises(ModelError, match="the model is exported, .*: give the module it was made from"):
            call()
    with pytest.raises(ModelError, match="has no evaluation mode .*: give the module it was exported from"):
        mean_loss(network(), exported, inputs())


class Stepped(nn.Linear):
    """Has extra state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"step": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("options", [BITS, prune_channels()])
def test_state_that_no_file_can_hold_is_told_before_measuring(options: Options, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Stepped(8, 3))

    told: list[object] = []
    needed = [{"folder": tmp_path / "run"}, {"budget": {"file_bytes": 5000}}, *([{}] if options is not BITS else [])]
    for more in needed:
        with pytest.raises(
            (ArtefactError, OptionsError), match="'2._extra_state' is dict, not a tensor|file_bytes is not"
        ):
            compress(model(), inputs(), options=options, on_measure=told.append, **{**BUDGET, **more})
    assert not told
    assert not list(tmp_path.iterdir())


def test_state_that_no_file_can_hold_is_told_in_the_report() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Stepped(8, 3))
    warnings = compress(model, inputs(), options=BITS, **BUDGET).report.warnings
    assert [text for text in warnings if "save" in text] == [
        "save_compressed() would refuse this model: the state dict's '2._extra_state' is dict, not a tensor: it "
        "cannot be stored"
    ]


SPARSE: dict[str, Options] = {
    "codes": prune_quantize(bits=(4,), sparsity=(0,), compensated=False),
    "compensated codes": prune_quantize(bits=(4,), sparsity=(0,), compensated=True),
    "low rank": low_rank(),
    "rounded activations": integer_products(bits=(8,)) + BITS,
}


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
@pytest.mark.parametrize("kind", SPARSE)
def test_layers_take_sparse_inputs(kind: str, method: str) -> None:
    sparse = [batch.to_sparse() for batch in inputs()]
    measurement = measure(network(), sparse, SPARSE[kind], method=method)
    if kind == "codes":
        expected = measure(network(), inputs(), SPARSE[kind], method="direct" if method == "fisher" else method)
        first = slice(0, 2 if method == "fisher" else None)  # fisher evaluates the layer with these inputs directly
        assert measurement.cost[first] == pytest.approx(expected.cost[first], rel=1e-3, abs=1e-12)
    result = compress(network(), sparse, options=SPARSE[kind], method=method, **BUDGET)
    assert result.report.usage["bytes"] <= result.report.budgets["bytes"]


def test_what_is_no_callback_or_path_is_refused_by_name(tmp_path: Path) -> None:
    model, data, three = network(), inputs(), cast(Any, 3)
    measurement = measure(model, data, BITS)
    problem = formulate(measurement, {"bytes": 0.6})
    choice = cast(Any, solve(problem, "greedy").choice)
    again = functools.partial(remeasure, model, data, measurement, choice)
    refined = functools.partial(refine, model, data, measurement, problem, choice)
    tuned = functools.partial(finetune, model, data, 2, teacher=model)
    names = ("on_encode", "on_measure", "on_timing", "on_progress", "on_round", "on_finetune", "folder", "output")
    calls: list[tuple[Callable[..., object], str]] = [
        *((functools.partial(compress, model, data, target="onnxruntime", **BUDGET), name) for name in names),
        *((functools.partial(measure, model, data, BITS), name) for name in ("on_progress", "on_encode", "cache")),
        *((call, name) for call in (again, refined, tuned) for name in ("on_progress", "cache")),
        (refined, "on_round"),
        (functools.partial(time_options, model, measurement, data[0]), "on_progress"),
        (functools.partial(solve, problem, "greedy"), "on_progress"),
    ]
    for call, name in calls:
        with pytest.raises((OptionsError, InvalidOptionError), match=f"^{name} must be a (function to call|path), "):
            call(**{name: three})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", ["1e-3", "1e-3 nats", " 0.001 "])
def test_a_limit_on_the_loss_may_be_text(limit: str) -> None:
    given: dict[str, Any] = {"minimize": "bytes", "options": BITS, "time_limit": 2}
    asked = compress(network(), inputs(), budget={"loss": limit}, **given)
    assert asked.report.usage == compress(network(), inputs(), budget={"loss": 1e-3}, **given).report.usage


@pytest.mark.parametrize("limit", ["10%", "1 kB", "much", "", "0", 0, True, None])
def test_what_is_no_limit_on_the_loss_says_what_is(limit: Any) -> None:
    match = r"the budget for the loss (must be a number above 0, for \"kl\" in nats|has no unit '.*'; known: nats$)"
    with pytest.raises(OptionsError, match=match) as why:
        compress(network(), inputs(), budget={"loss": limit}, minimize="bytes")
    assert "share" not in str(why.value)


def test_a_loss_that_stands_for_an_infinite_one_is_called_so() -> None:
    (told,) = of_prediction("kl", 1e-3, 6.85e27, "patience")
    assert "in truth it is infinite" in told
    assert "factor" not in told
    (told,) = of_prediction("mse", 1e-3, 6.85e27, "patience")
    assert "a factor of 6.85e+30" in told
