"""A batch without a sample is one clear error of every function that takes data."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    apply,
    compress,
    export,
    find_sets,
    finetune,
    fit_in_turn_,
    formulate,
    mean_loss,
    measure,
    prune_channels,
    prune_quantize,
    refine,
    remeasure,
    solve,
    time_options,
    verify,
)  # fmt: skip
from qcompress.agreement import agreement
from qcompress.errors import DataError
from qcompress.filters import read_filters
from qcompress.model.batch_norm import reestimate_
from qcompress.model.samples import split_samples

BITS = prune_quantize(bits=(4,), sparsity=(0,))


class Loader:
    """Batches that are not in a list."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[Tensor]:
    return [torch.linspace(-1, 1, 96).reshape(16, 6), torch.linspace(-2, 1, 96).reshape(16, 6).square()]


def chosen() -> tuple[nn.Module, Any, Any, Any]:
    model = network()
    measurement = measure(model, batches(), BITS)
    problem = formulate(measurement, {"bytes": 0.7})
    return model, measurement, problem, solve(problem, "greedy")


def refined(data: Iterable[Any]) -> object:
    model, measurement, problem, solution = chosen()
    return refine(model, data, measurement, problem, solution.choice)


def measured_again(data: Iterable[Any]) -> object:
    model, measurement, _, solution = chosen()
    return remeasure(model, data, measurement, solution.choice)


def applied(data: Iterable[Any]) -> object:
    model, measurement, _, solution = chosen()
    return apply(model, measurement, solution, batch_norm_data=data)


def fitted(data: Iterable[Any]) -> object:
    model = network()
    small = compress(
        model, batches(), budget={"bytes": 0.8}, options=prune_channels(), guard=False, solver="greedy"
    ).model
    return fit_in_turn_(small, model, data)


def compressed(data: Iterable[Any], **more: Any) -> object:
    settings = {"budget": {"bytes": 0.7}, "options": BITS, "solver": "greedy", **more}
    return compress(network(), data, **settings)


TAKING: dict[str, Callable[[Iterable[Any]], object]] = {
    **{f"measure {name}": lambda data, name=name: measure(network(), data, BITS, method=name)
       for name in ("fisher", "direct", "sampled")},
    "measure compensated": lambda data: measure(network(), data, prune_quantize(bits=(4,), compensated=True)),
    "measure channels": lambda data: measure(network(), data, prune_channels()),
    "measure in processes": lambda data: measure(network(), data, BITS, jobs=2),
    "remeasure": measured_again,
    "refine": refined,
    "compress": compressed,
    "compress unguarded": lambda data: compressed(data, guard=False),
    "validation": lambda data: compressed(batches(), validation=data),
    "batch_norm_data": lambda data: compressed(batches(), batch_norm_data=data),
    "apply": applied,
    "reestimate_": lambda data: reestimate_(network(), data),
    "mean_loss": lambda data: mean_loss(network(), network(), data),
    "finetune": lambda data: finetune(network(), data, 4, teacher=network()),
    "finetune validation": lambda data: finetune(network(), batches(), 4, teacher=network(), validation=data),
    "agreement": lambda data: agreement(network(), network(), data),
    "fit_in_turn_": fitted,
    "filters": lambda data: read_filters(nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3)), data),
}  # fmt: skip


@pytest.mark.parametrize("kind", [list, Loader])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", TAKING)
def test_a_batch_without_a_sample_is_named(name: str, place: int, kind: Callable[[list[Tensor]], Any]) -> None:
    data = batches()
    data.insert(place, data[0][:0])
    with pytest.raises(DataError, match=r"holds no sample \(tensors of shape \(0, 6\)\): leave it out") as why:
        TAKING[name](kind(data))
    if kind is list:
        assert f"[{place}] holds" in str(why.value)


def test_a_single_batch_without_a_sample_is_named(tmp_path: Path) -> None:
    model, measurement, _, _ = chosen()
    nothing, match = batches()[0][:0], r"holds no sample \(tensors of shape \(0, 6\)\)"
    with pytest.raises(DataError, match=match):
        time_options(model, measurement, nothing)
    with pytest.raises(DataError, match=match):
        find_sets(model, [nothing])
    with pytest.raises(DataError, match=match):
        split_samples(model, [nothing, *batches()])
    with pytest.raises(DataError, match=match):
        export(model, tmp_path / "model.onnx", target="onnxruntime", example=nothing)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DataError, match=match):
        verify(tmp_path / "model.onnx", model, [nothing], target="onnxruntime")


def test_samples_without_a_position_are_told_by_their_outputs() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(DataError, match=r"holds no sample \(tensors of shape \(2, 0\)\)"):
        measure(model, [torch.zeros(2, 0, dtype=torch.long)], BITS)

    def cut(network: nn.Module, batch: Tensor) -> Tensor:
        return network(batch)[:, :0]

    with pytest.raises(DataError, match=r"has the shape \(2, 0, 3\), without any number"):
        measure(model, [torch.zeros(2, 3, dtype=torch.long)], BITS, forward=cut)


def test_an_empty_tensor_beside_others_is_no_empty_batch() -> None:
    data = [{"x": batch, "boxes": torch.zeros(0, 4)} for batch in batches()]
    measured = measure(network(), data, BITS, forward=lambda model, batch: model(batch["x"]))
    assert measured.num_samples == 32
