"""What cannot work is said before anything is measured, and nothing that can work is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from formulations import InfeasibleBudgetError
from qcompress import compress, finetune, formulate, low_rank, measure, prune_quantize
from qcompress.errors import DataError
from qcompress.model.batch_norm import reestimate_
from qcompress.options import Options, gguf_types
from tests.models import Residual, seeded


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 2, 5, 5, generator=generator) for _ in range(count)]


FAMILIES = {
    "bits": prune_quantize(bits=(2, 4)),
    "compensated": prune_quantize(bits=(3,), sparsity=(0,), compensated=True),
    "groups": prune_quantize(bits=(4,), group_size=4),
    "ratio": low_rank(),
    "rank": low_rank(ranks=(2,), kinds=("channels", "spatial", "tucker", "sliced")),
    "then": low_rank(ratios=(0.5,)).then(prune_quantize(bits=(4,), sparsity=(0,))),
    "joint": prune_quantize(bits=(4,), sparsity=(0,)) + low_rank(ratios=(0.25,)),
}


@pytest.mark.parametrize("resource", ["bytes", "macs", "file_bytes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_use_is_known_before_measuring(family: str, resource: str, tmp_path: Path) -> None:
    options = FAMILIES[family]
    model = seeded(Residual)
    measured = measure(model, images(), options)
    own = "bytes" if resource == "file_bytes" else resource
    smallest = formulate(measured, {own: 1.0}).minimum_usage()[own]
    told: list[object] = []
    with pytest.raises(
        InfeasibleBudgetError, match=f"{own}: asked for at most .*, the smallest possible use is"
    ) as why:
        compress(
            model, images(), budget={resource: f"{0.99 * smallest}" if own == "macs" else 0.99 * smallest},
            options=options, folder=tmp_path, on_measure=told.append, on_encode=told.append,
        )  # fmt: skip
    assert not told
    assert why.value.problem is not None
    assert ("are fixed" in str(why.value)) == (own == "bytes")


@pytest.mark.parametrize("family", ["bits", "then", "joint"])
def test_the_smallest_use_itself_is_not_refused(family: str) -> None:
    model = seeded(Residual)
    smallest = formulate(measure(model, images(), FAMILIES[family]), {"bytes": 1.0}).minimum_usage()["bytes"]
    result = compress(model, images(), budget={"bytes": smallest}, options=FAMILIES[family], solver="greedy")
    assert result.report.usage["bytes"] == smallest


@pytest.mark.parametrize("offers", [low_rank(energies=(0.5, 0.9)), low_rank(ratios=(0.25,), kinds=("tucker",))])
def test_what_the_weights_alone_tell_is_taken_at_its_least(offers: Options) -> None:
    model = seeded(Residual)
    smallest = formulate(measure(model, images(), offers), {"bytes": 1.0}).minimum_usage()["bytes"]
    compress(model, images(), budget={"bytes": smallest}, options=offers, solver="greedy", guard=False)
    with pytest.raises(InfeasibleBudgetError):
        compress(model, images(), budget={"bytes": smallest - 1}, options=offers, solver="greedy", guard=False)


def test_a_type_that_falls_back_to_a_smaller_one_is_counted_as_that() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))  # 64 is no multiple of Q4_K's 256
    types = gguf_types(("Q4_K",))
    smallest = formulate(measure(model, [torch.eye(64)], types), {"bytes": 1.0}).minimum_usage()["bytes"]
    result = compress(model, [torch.eye(64)], budget={"bytes": smallest}, options=types, solver="greedy", guard=False)
    assert result.report.usage["bytes"] == smallest


class Experts(nn.Module):
    """Takes another layer for negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else self.two(x)


def test_layers_that_only_later_batches_reach_are_not_taken_for_fixed() -> None:
    torch.manual_seed(0)
    model, data = Experts(), [torch.rand(6, 8), -torch.rand(6, 8)]
    options = prune_quantize(bits=(2,), sparsity=(0,))
    smallest = formulate(measure(model, data, options), {"bytes": 1.0}).minimum_usage()["bytes"]
    result = compress(model, data, budget={"bytes": smallest}, options=options, solver="greedy", guard=False)
    assert result.report.usage["bytes"] == smallest


@pytest.mark.parametrize("alike", [True, False])
def test_a_resource_that_no_option_lowers_is_told_before_measuring_without_what_is_fixed(alike: bool) -> None:
    told: list[object] = []
    data = images() if alike else [*images(), images()[0].repeat(1, 1, 2, 2)]
    with pytest.raises(InfeasibleBudgetError, match="no enabled option lowers macs: fewer bits do not") as why:
        compress(
            seeded(Residual), data, budget={"bytes": "50%", "macs": "90%"}, options=FAMILIES["bits"],
            on_measure=told.append, on_encode=told.append,
        )  # fmt: skip
    assert "are fixed" not in str(why.value)
    assert not told


@pytest.mark.parametrize(("data", "resource"), [(1, "macs"), (2, "macs"), (1, "bytes")])
def test_layers_without_an_option_that_lowers_a_resource_are_named_with_their_share(data: int, resource: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 16)
    )
    batches = [torch.randn(8, 4, 20 + index) for index in range(data)]  # of two shapes: said after measuring
    with pytest.raises(InfeasibleBudgetError) as why:
        compress(model, batches, budget={resource: 0.2}, options=low_rank(ratios=(0.25,)))
    layers = {"0": model[0].weight.numel(), "2": model[2].weight.numel()}
    if resource == "macs":
        places = [sum(batch.shape[2] - taken for batch in batches) / data for taken in (4, 8)]
        layers = {name: count * place for (name, count), place in zip(layers.items(), places, strict=True)}
    rest = sum(tensor.numel() for tensor in model.parameters()) - 64 * 5 - 256 * 5 if resource == "bytes" else 256
    whole = sum(layers.values()) + rest
    shares = [f"{layers[name] / whole:.0%}" for name in ("2", "0")]
    assert f"No option on offer lowers the {resource} of '2' (Conv1d) {shares[0]}, '0' (Conv1d) {shares[1]}: " in str(
        why.value
    )
    assert f"together {(whole - rest) / whole:.0%} of the model's {resource}" in str(why.value)


class Reader(nn.Module):
    """An LSTM, whose errors about shapes are ValueErrors."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize(
    "run",
    [
        lambda model, data: compress(model, data, budget={"bytes": 0.5}),
        lambda model, data: measure(model, data, FAMILIES["bits"]),
        lambda model, data: finetune(model, data, 1, teacher=model),
        lambda model, data: reestimate_(nn.Sequential(model, nn.BatchNorm1d(3)), data),
    ],
)
def test_any_error_of_the_first_pass_names_the_batch(run: Callable[[nn.Module, list[Tensor]], object]) -> None:
    match = r"the model does not accept .* \(a tensor of shape \(8, 2, 5, 5\)\): ValueError: LSTM: Expected input"
    with pytest.raises(DataError, match=match) as why:
        run(seeded(Reader), images())
    assert isinstance(why.value.__cause__, ValueError)


def test_validation_that_the_model_does_not_take_is_told_before_measuring() -> None:
    told: list[object] = []
    for wrong, match in (
        ([torch.randn(4, 3, 5, 5)], "does not accept a batch of validation .*channels"),
        ([torch.randn(2, 5, 5)], "validation"),
    ):
        with pytest.raises(DataError, match=match):
            compress(seeded(Residual), images(), budget={"bytes": 0.5}, validation=wrong, on_measure=told.append)
    assert not told


def test_an_unreachable_budget_names_options_that_do_not_fit_and_why() -> None:
    model = nn.Sequential(nn.Linear(80, 64), nn.ReLU(), nn.Linear(64, 10))
    options = gguf_types(("Q4_0", "F16"))
    with pytest.raises(InfeasibleBudgetError) as error:
        compress(model, [torch.zeros(4, 80)], budget={"bits_per_weight": 4.6}, options=options)
    why = "'0': Q4_0 takes rows of a multiple of 32 weights, these have 80"
    assert str(error.value).endswith(f". 'Q4_0' does not fit 1 of 2 parts ({why})")
