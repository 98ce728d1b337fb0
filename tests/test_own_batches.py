"""A forward pass may take entries out of its batch or write to it: the caller's data stays what it is."""

import copy
import dataclasses
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.model.batches import own
from qcompress.model.forward import run

OPTIONS = qcompress.prune_quantize(bits=(2, 4), sparsity=(0,))
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Record:
    x: torch.Tensor
    more: dict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)))


class Adding(Net):
    def forward(self, x):
        return super().forward(x.add_(1.0).sub_(1.0).mul_(2.0))


class Twice(Net):
    """Computes the same as `Adding` without changing its input."""

    def forward(self, x):
        return super().forward(2 * x)


def popping(model, batch):
    batch.pop("labels")
    return model(batch["x"])


def writing(model, batch):
    batch["x"] += 1
    batch["x"] -= 1
    batch["more"][0].zero_()
    batch["more"].append(None)
    return model(batch["x"])


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 12, generator=generator) for _ in range(4)]


def same(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


FUNCTIONS = {
    "measure": lambda model, batches, forward: qcompress.measure(model, batches, OPTIONS, forward=forward).cost,
    "direct": lambda model, batches, forward: (
        qcompress.measure(model, batches, OPTIONS, method="direct", forward=forward).cost
    ),
    "compress": lambda model, batches, forward: (
        qcompress.compress(model, batches, budget={"bytes": 0.4}, time_limit=2, forward=forward).report.loss_measured
    ),
    "mean_loss": lambda model, batches, forward: qcompress.mean_loss(changed(model), model, batches, forward=forward),
    "finetune": lambda model, batches, forward: (
        qcompress.finetune(changed(model), batches, 5, teacher=model, forward=forward)
        .state_dict()["c.weight"]
        .numpy(force=True)
    ),
}


def changed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.c.weight.mul_(1.1)
    return other


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inputs_that_are_written_to_stay(name, data):
    before = copy.deepcopy(data)
    found = FUNCTIONS[name](Adding(), data, None)
    expected = FUNCTIONS[name](Twice(), data, None)
    assert all(map(torch.equal, data, before))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("forward", [popping, writing])
@pytest.mark.parametrize("mapping", [dict, UserDict])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_entries_that_are_taken_out_or_written_to_stay(name, mapping, forward, data):
    batches = [mapping(x=x, labels=torch.zeros(16, dtype=torch.long), more=[torch.ones(3)]) for x in data]
    found = FUNCTIONS[name](Net(), batches, forward)
    expected = FUNCTIONS[name](Net(), data, None)
    assert [sorted(batch) for batch in batches] == [["labels", "more", "x"]] * 4
    assert all(torch.equal(batch["x"], x) for batch, x in zip(batches, data, strict=True))
    assert all(len(batch["more"]) == 1 and batch["more"][0].all() for batch in batches)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_channels_and_times_leave_the_data_alone(data):
    before, model = copy.deepcopy(data), Adding()
    measurement = qcompress.measure(model, data, qcompress.prune_channels(keep=(0.5,)))
    qcompress.time_options(model, measurement, data[0], repeats=1)
    qcompress.time_options(model, qcompress.measure(model, data, OPTIONS), data[0], repeats=1)
    assert all(map(torch.equal, data, before))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.numpy(),
        lambda x: [x, "text"],
        lambda x: (x, 3),
        lambda x: Pair(x, None),
        lambda x: {"x": [x]},
        lambda x: UserDict(x=x),
        lambda x: Record(x, {"y": (x,)}),
    ],
)
def test_a_copy_is_of_the_same_kind_and_shares_no_memory(make):
    batch = make(torch.ones(3))
    found = own(batch)
    assert type(found) is type(batch)
    assert repr(found) == repr(batch)
    for tensor in leaves(found):
        tensor[:] = 0
    assert all(tensor.all() for tensor in leaves(batch))


def leaves(value):
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return [leaf for item in items for leaf in leaves(item)]


def test_what_is_no_container_is_the_same_and_gradients_stay_asked_for():
    text, kept = "text", object()
    assert own(text) is text
    assert own(kept) is kept
    given = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert own(given).requires_grad
    assert run(Net(), torch.ones(2, 12)).shape == (2, 5)
