"""Layers are replaced by smaller ones only where these do all that the network asks of the layer."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formulations import InfeasibleBudgetError
from qcompress import (
    apply,
    compress,
    fold_,
    formulate,
    load_compressed,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
    save_compressed,
)
from qcompress.compressed.factored import Factored
from qcompress.model.tensors import held_tensors
from tests.measurements import solution

RANKS = low_rank(ranks=(2, 4), whitened=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return out


def hooked() -> Net:
    net = Net()
    net.a.register_forward_hook(lambda layer, given, output: 5 * output + 1)
    net.b.register_forward_pre_hook(lambda layer, given: (2 * given[0],))
    return net


def with_state_for_a_hook() -> Net:
    net = Net()
    net.a.register_buffer("shift", torch.ones(32))
    net.a.register_parameter("scale", nn.Parameter(3 * torch.ones(32)))
    net.a.register_forward_hook(lambda layer, given, output: layer.scale * output + layer.shift)
    return net


class InAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.order = [self.a, self.b, self.c]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = torch.tanh(layer(x))
        return x


class Box:
    first: nn.Module


class InAnObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.box = Box()
        self.box.first = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.relu(self.box.first(x)))))
        return out


class Sizes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a.gain = 3.0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.a.gain * x.view(-1, self.a.in_features))


class ReadsTheWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.a.weight.mean()


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.conv(nn.functional.pad(x.view(-1, 1, 4, 4), [self.conv.kernel_size[0] // 2] * 4)))
        out: Tensor = self.head(maps.mean((2, 3)))
        return out


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.table((x * 10).long().abs() % self.table.num_embeddings).mean(1))
        return out


REPLACED: dict[str, Callable[[], nn.Module]] = {
    "hooks": hooked,
    "a hook that reads the layer's own state": with_state_for_a_hook,
    "a plain list": InAList,
    "an object": InAnObject,
    "attributes": Sizes,
    "the weight": ReadsTheWeight,
    "a kernel's size": Pictures,
    "the number of words": Words,
}


class Own(nn.Linear):
    def normed(self, x: Tensor) -> Tensor:
        return x / len(x)


class Method(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = Own(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.a.normed(x))  # type: ignore[operator]


class Asking(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if isinstance(self.a, nn.Linear) else 2 * super().forward(x)


class Named(Net):
    def __init__(self) -> None:
        super().__init__()
        self.same = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.same.mean()


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.a.weight]


class Viewed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rows = self.a.weight.data[:3]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.rows.mean()


def captured() -> Net:
    net = Net()
    net.b.register_forward_hook(lambda layer, given, output, weight=net.a.weight: output + weight.mean())
    return net


def with_modules_inside() -> Net:
    net = Net()
    net.a.add_module("beside", nn.Linear(16, 32))
    net.a.register_forward_hook(lambda layer, given, output: output + layer.beside(given[0]))
    return net


class Stateful(nn.Linear):
    def get_extra_state(self) -> Tensor:
        return torch.ones(3)

    def set_extra_state(self, state: Any) -> None:
        pass


def with_extra_state() -> Net:
    net = Net()
    net.a = Stateful(16, 32)
    return net


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a method": (Method, "the network needs the layer itself (AttributeError: "),
    "its class": (Asking, "the network uses it other than by calling it"),
    "a second name of the weight": (Named, "'same' refers to its weight"),
    "the weight in a list": (Listed, "'weights[0]' refers to its weight"),
    "a view of the weight": (Viewed, "'rows' refers to its weight"),
    "the weight in a closure": (captured, "the network uses it other than by calling it"),
    "modules of its own": (with_modules_inside, "it holds modules of its own"),
    "extra state": (with_extra_state, "its class has extra state"),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def inputs() -> list[Tensor]:
    return [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_layer_has_stays_with_what_replaces_it(name: str, tmp_path: Path) -> None:
    make, data = REPLACED[name], inputs()
    model = made(make)
    before = {item.name for item in held_tensors(model)}
    measurement = measure(model, data, RANKS, method="direct")
    problem = formulate(measurement, {"bytes": 1.0})
    assert len(measurement.transforms[0]) > 1
    for part, options in enumerate(measurement.transforms):
        for option in range(1, len(options)):
            choice = np.zeros(len(measurement.parts), int)
            choice[part] = option
            smaller = apply(model, measurement, solution(choice.tolist()))
            predicted = measurement.cost[problem.flat(choice)[part]]
            assert mean_loss(model, smaller, data) == pytest.approx(predicted, rel=1e-3, abs=1e-9)
            assert predicted > 1e-6
            saved = save_compressed(smaller, tmp_path / "model")
            loaded = load_compressed(saved.path, lambda: made(make))
            assert torch.equal(loaded(data[0]), smaller(data[0]))
            folded = fold_(copy.deepcopy(smaller))
            assert torch.allclose(folded(data[0]), smaller(data[0]), atol=1e-5)
            assert {item.name for item in held_tensors(folded)} == before
            folded.load_state_dict(model.state_dict())
            assert torch.equal(folded(data[0]), model(data[0]))


def test_a_budget_that_only_replacing_such_a_layer_meets_is_refused_before_measuring() -> None:
    told: list[object] = []
    with pytest.raises(InfeasibleBudgetError, match="No option on offer lowers the bytes of 'a'"):
        compress(made(Method), inputs(), budget={"bytes": 0.35}, options=RANKS, on_measure=told.append)
    assert not told
    compress(made(Net), inputs(), budget={"bytes": 0.35}, options=RANKS, solver="greedy")


def test_an_unreachable_budget_says_why_layers_cannot_be_replaced() -> None:
    told = r"Smaller layers cannot replace 'a': the network needs the layer itself \(AttributeError"
    quarter = prune_quantize(bits=(4,), sparsity=(0,))
    with pytest.raises(InfeasibleBudgetError, match=told):
        compress(made(Method), inputs(), budget={"bytes": 0.35}, options=RANKS)
    for options in (RANKS, RANKS + quarter):
        measurement = measure(made(Method), inputs(), options)
        with pytest.raises(InfeasibleBudgetError, match=told):
            compress(made(Method), inputs(), budget={"macs": 0.01}, measurement=measurement)
    with pytest.raises(InfeasibleBudgetError, match="cannot be replaced by smaller layers: ") as caught:
        compress(made(Method), inputs(), budget={"bytes": 0.01}, measurement=measure(made(Method), inputs(), RANKS))
    assert str(caught.value).count("the network needs the layer itself") == 1
    with pytest.raises(InfeasibleBudgetError) as caught:
        compress(made(Net), inputs(), budget={"macs": 0.01}, options=RANKS)
    assert "cannot replace" not in str(caught.value)


@pytest.mark.parametrize("name", KEPT)
def test_a_layer_that_the_network_needs_itself_stays_with_the_reason(name: str) -> None:
    make, reason = KEPT[name]
    model, data = made(make), inputs()
    expected = model(data[0])
    measurement = measure(model, data, RANKS)
    assert [item.name for item in measurement.unchanged] == ["a"]
    assert measurement.unchanged[0].reason.startswith(f"it cannot be replaced by smaller layers: {reason}")
    both = measure(model, data, RANKS + prune_quantize(bits=(4,), sparsity=(0,)))
    assert both.labels[0] == ("keep", "4 bits")
    assert [note for note in both.notes if note.startswith(f"a: not replaced by smaller layers, {reason}")]
    assert torch.equal(model(data[0]), expected)
    if name != "the weight in a closure":  # which no copy of the model is free of
        result = compress(model, data, budget={"bytes": 0.9}, options=RANKS, solver="greedy")
        assert not isinstance(result.model.a, Factored)
        assert reason in result.report.to_markdown()


class AnyLinear(Net):
    """A network that asks whether one of two layers, whichever, is an ordinary one."""

    def forward(self, x: Tensor) -> Tensor:
        if not any(isinstance(layer, nn.Linear) for layer in (self.a, self.c)):
            raise TypeError("no ordinary layer is left")
        return super().forward(x)


def test_layers_that_fail_only_together_all_stay() -> None:
    model, data = made(AnyLinear), inputs()
    measurement = measure(model, data, RANKS)
    assert {"a", "c"} <= {item.name for item in measurement.unchanged}
    assert all("no ordinary layer is left" in item.reason for item in measurement.unchanged)


def test_running_out_of_memory_is_no_reason_to_keep_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("qcompress.measuring.replacing._replace_by_equal", out_of_memory)
    with pytest.raises(MemoryError):
        measure(made(Net), inputs(), RANKS)
