"""Computed weights are measured and stored as what they give."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qcompress import (
    apply,
    compress,
    formulate,
    load_compressed,
    low_rank,
    measure,
    prune_quantize,
    save_compressed,
    solve,
)
from qcompress.model.composed import compose_, composed
from tests.measurements import solution

OPTIONS = prune_quantize(bits=(4, 8), sparsity=(0,))


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm with hooks": old_weight_norm,
    "spectral_norm with hooks": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(COMPUTED[kind](nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)).eval()


def batch() -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", COMPUTED)
def test_composing_changes_no_output_and_is_undone(kind: str) -> None:
    model = network(kind)
    expected, state = model(batch()), {name: value.clone() for name, value in model.state_dict().items()}
    with composed(model):
        assert torch.equal(model(batch()), expected)
        assert type(model[0]) is nn.Linear
        assert set(dict(model[0].named_parameters())) == {"weight", "bias"}
    assert torch.equal(model(batch()), expected)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()(batch()).sum().backward()  # it still trains
    compose_(model.eval())
    assert set(dict(model[0].named_parameters())) == {"weight", "bias"}


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_stored_as_they_are_used(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    before = model(batch())
    measurement = measure(model, [batch()], OPTIONS)
    assert [part.name for part in measurement.parts] == ["0", "2"]
    solution = solve(formulate(measurement, {"bytes": 0.5}), "brute-force")
    smaller = apply(model, measurement, solution)
    saved = save_compressed(smaller, tmp_path / "model.safetensors")
    assert saved.payload_bytes == solution.usage["bytes"]
    loaded = load_compressed(saved.path, lambda: network(kind))
    assert torch.equal(loaded(batch()), smaller.eval()(batch()))
    assert torch.equal(model(batch()), before)


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_replaced_by_smaller_layers(kind: str, tmp_path: Path) -> None:
    options = low_rank(ranks=(2,), kinds=("channels",)) + OPTIONS
    result = compress(network(kind), [batch()], budget={"bytes": 0.95}, options=low_rank(ranks=(2,)), folder=tmp_path)
    assert result.report.parts[0].option == "rank 2, whitened"
    loaded = load_compressed(tmp_path / "model.safetensors", lambda: network(kind))
    assert torch.equal(loaded(batch()), result.model(batch()))
    measurement = measure(network(kind), [batch()], options)
    for choice in range(len(measurement.transforms[0])):
        smaller = apply(network(kind), measurement, solution([choice, 0]))
        saved = save_compressed(smaller, tmp_path / "one")
        assert torch.equal(load_compressed(saved.path, lambda: network(kind))(batch()), smaller(batch()))


def test_compress_takes_a_computed_weight() -> None:
    model = network("weight_norm")
    result = compress(model, [batch()], budget={"bytes": 0.5}, options=OPTIONS, solver="greedy")
    assert type(result.model[0]) is nn.Linear
    assert result.report.usage["bytes"] <= 0.5 * result.measurement.original["bytes"]
