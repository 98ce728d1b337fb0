"""Plain attributes that a forward pass changes: put back, so that no pass depends on an earlier one."""

from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    apply,
    compress,
    finetune,
    formulate,
    load_compressed,
    measure,
    prune_quantize,
    save_compressed,
    solve,
)
from qcompress.errors import ModelError
from qcompress.model import plain_state
from qcompress.model.forward import run
from qcompress.model.plain_state import kept, plain_tensors
from tests.measuring.methods.test_evidence import inputs

OPTIONS = prune_quantize(bits=(4, 8), sparsity=(0,))


class Storing(nn.Module):
    """Stores an activation, and in the same pass counts in every way that an attribute allows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.seen: list[Tensor] = []
        self.last: dict[str, Tensor] = {}
        self.shapes: set[Any] = set()
        self.queue: deque[int] = deque([1, 2], maxlen=2)
        self.state = SimpleNamespace(calls=0, nested=[{"calls": 0}])
        self.plain, self.array, self.pair = torch.zeros(3), np.zeros(3), ([0],)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.relu(self.first(x))
        self.head.inputs = self.hidden  # type: ignore[assignment]
        self.seen.append(self.hidden)
        self.last["hidden"] = self.hidden
        self.shapes.add(tuple(x.shape))
        self.queue.append(3)
        self.state.calls += 1
        self.state.nested[0]["calls"] += 1
        self.plain += 1
        self.array += 1
        self.pair[0].append(1)
        return self.head(self.hidden)

    def untouched(self) -> bool:
        """Whether everything is as it was made."""
        return (
            not (hasattr(self, "hidden") or hasattr(self.head, "inputs"))
            and (self.seen, self.last, self.shapes, list(self.queue)) == ([], {}, set(), [1, 2])
            and (self.state.calls, self.state.nested, self.pair) == (0, [{"calls": 0}], ([0],))
            and float(self.plain.sum()) == float(self.array.sum()) == 0
        )


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_a_model_that_stores_activations_is_compressed_and_keeps_nothing_of_the_passes(method: str) -> None:
    torch.manual_seed(0)
    model, data = Storing(), [inputs(32, 12), inputs(32, 12, seed=2)]
    measurement = measure(model, data, OPTIONS, method=method)
    assert model.untouched()
    assert not measurement.notes  # no output depends on what is stored
    smaller = apply(model, measurement, solve(formulate(measurement, {"bytes": 0.5})))
    result = compress(model, data, budget={"bytes": 0.5}, options=OPTIONS, method=method)
    assert all(own.untouched() for own in (model, smaller, result.model))
    assert finetune(result.model, data, 2, teacher=model).untouched()
    assert model.untouched()


class Patching(nn.Module):
    """Replaces its forward in the first pass and keeps the original, as compressed-tensors does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.original_forward = self.layer.forward
        self.layer.forward = lambda values: self.original_forward(values)  # type: ignore[method-assign]
        self.forward = lambda values: self.layer(values)  # type: ignore[method-assign]
        return self.layer(x)


def test_functions_that_a_pass_stores_stay_beside_the_forward_that_calls_them() -> None:
    model = Patching().eval()
    first, second = (run(model, inputs(3, 12)) for _ in range(2))
    assert torch.equal(first, second)


def test_activations_that_the_user_stored_are_copied_without_their_graph() -> None:
    torch.manual_seed(0)
    model, data = Storing(), [inputs(32, 12)]
    model(data[0])
    measurement = measure(model, data, OPTIONS)
    smaller = apply(model, measurement, solve(formulate(measurement, {"bytes": 0.5})))
    assert model.hidden.requires_grad
    assert not smaller.hidden.requires_grad
    assert torch.equal(smaller.hidden, model.hidden)
    assert smaller.last["hidden"] is smaller.hidden


class Scaled(nn.Module):
    """Computes a value from its weight in the first pass and uses it from then on."""

    def __init__(self, kind: str = "number") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(12, 32), nn.Linear(32, 5)
        self.kind, self.scale, self.scales = kind, None, {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.scales:
            self.scales["tensor"] = self.first.weight.detach().abs().amax(1)
        if self.scale is None:
            self.scale = (
                float(self.first.weight.detach().abs().max()) if self.kind == "number" else self.scales["tensor"]
            )  # type: ignore[assignment]
        return self.head(torch.tanh(3 * self.first(x) / self.scale))


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_values_computed_from_weights_in_a_pass_are_computed_again_from_the_new_weights(
    kind: str, tmp_path: Path
) -> None:
    model, data = Scaled(kind), [inputs(32, 12, seed=seed) for seed in (1, 2, 3, 4)]
    result = compress(model, data, budget={"bytes": 0.3}, options=OPTIONS)
    assert (model.scale, model.scales) == (None, {})
    save_compressed(result.model, tmp_path / "model.safetensors")
    loaded = load_compressed(tmp_path / "model.safetensors", lambda: Scaled(kind))
    with torch.no_grad():
        assert torch.equal(result.model(data[0]), loaded(data[0]))
        assert not torch.equal(loaded(data[0]), model(data[0]))


class Recurrent(nn.Module):
    """Its output depends on the pass before."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.state = nn.Linear(5, 5), torch.ones(5)

    def forward(self, x: Tensor) -> Tensor:
        self.state = 0.5 * self.state + self.step(x).mean(0)
        return self.step(x) + self.state


def test_attributes_by_which_one_pass_affects_the_next_are_named() -> None:
    torch.manual_seed(0)
    model, data = Recurrent(), [inputs(16, 5), inputs(16, 5, seed=2)]
    before = model.state
    for method in ("fisher", "direct", "sampled"):
        measurement = measure(model, data, OPTIONS, method=method, loss="mse")
        assert measurement.notes == ("state changes while the model runs; it was restored after every pass",)
        assert model.state is before


def test_what_is_too_large_to_be_recorded_is_refused_only_if_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_state, "MOST_NUMBERS", 2)
    model = Storing()
    with pytest.raises(ModelError, match="changed plain in place"):
        run(model, inputs(4, 12))
    reading = nn.Linear(12, 2)
    reading.table = torch.zeros(100)  # type: ignore[assignment]
    run(reading, inputs(4, 12))


def test_what_a_pass_creates_together_with_parameters_stays() -> None:
    class Lazy(nn.Module):
        made = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.made:
                self.layer, self.made = nn.Linear(x.shape[1], 2), True
            return self.layer(x)

    model = Lazy()
    assert torch.equal(run(model, inputs(4, 12)), run(model, inputs(4, 12)))
    assert model.made


def test_parameters_buffers_and_their_views_are_not_plain_state() -> None:
    model = nn.GRU(3, 4)
    model.view = model.weight_ih_l0.detach()[:2]  # type: ignore[assignment]
    with kept(model), torch.no_grad():
        model.weight_ih_l0 += 1
        model.weight_hh_l0 = nn.Parameter(torch.zeros(12, 4))
        model.eval()
    assert not model.training
    assert torch.equal(model.view, model.weight_ih_l0[:2])
    assert model._flat_weights[1] is model.weight_hh_l0
    assert list(plain_tensors(model)) == ["view"]
