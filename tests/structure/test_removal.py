"""What is removed computes what was masked, for all the ways in which channels are coupled."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.compressed.removal import mask_, remove_
from qcompress.errors import ModelError
from qcompress.model.counting import count
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.uses import uses_of
from tests.structure.random_channels import random_network

SAME = 1e-4  # relative: float32 sums of other lengths round otherwise


def images(seed: int) -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(24))
def test_the_smaller_network_computes_what_the_masked_one_does_and_uses_what_was_predicted(seed: int) -> None:
    network, data, rng = random_network(seed), images(seed), np.random.default_rng(seed)
    sets = find_sets(network, [data]).sets
    removed = {item.name: rng.choice(item.num_units, rng.integers(item.num_units), replace=False) for item in sets}
    predicted = uses_of(network, sets, count(network, [data], None))
    masked = mask_(copy.deepcopy(network), sets, removed)
    smaller = remove_(copy.deepcopy(network), sets, removed)
    with torch.no_grad():
        expected, found = masked(data), smaller(data)
    assert float((expected - found).abs().max()) <= SAME * float(expected.abs().max())
    kept = [item.num_units - len(removed[item.name]) for item in sets]
    uses = predicted.of(kept)
    assert uses["bytes"] == pytest.approx(total_bytes(smaller), rel=1e-12)
    assert uses["macs"] == pytest.approx(count(smaller, [data], None).macs, rel=1e-9)


def test_tables_of_options_add_up_to_the_uses() -> None:
    network, data, rng = random_network(3), images(3), np.random.default_rng(3)
    sets = find_sets(network, [data]).sets
    uses = uses_of(network, sets, count(network, [data], None))
    kept = [sorted({1, item.num_units // 2, item.num_units} - {0}) for item in sets]
    starts = np.cumsum([0, *map(len, kept)])[:-1]
    for name in ("bytes", "macs"):
        constant, linear, pairs = uses.tables(name, kept)
        for _ in range(10):
            choice = np.array([rng.integers(len(options)) for options in kept])
            chosen = np.zeros(len(linear))
            chosen[starts + choice] = 1
            expected = uses.of([options[own] for options, own in zip(kept, choice, strict=True)])[name]
            assert constant + linear @ chosen + chosen @ (pairs @ chosen) == pytest.approx(expected, rel=1e-12)


def test_modules_names_hooks_and_parameters_stay_the_same_objects() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 2)).eval()
    called: list[str] = []
    network[0].register_forward_hook(lambda *_: called.append("hook"))
    weight = network[0].weight
    remove_(network, find_sets(network, [images(0)]).sets, {"0": [1, 2]})
    called.clear()
    assert network(images(0)).shape == (3, 2)
    assert called == ["hook"]
    assert network[0].weight is weight
    assert weight.shape == (6, 3, 1, 1)
    assert repr(network[0]) == "Conv2d(3, 6, kernel_size=(1, 1), stride=(1, 1))"
    assert network[4].in_features == 6 * 64
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    network.load_state_dict(torch.load(file, weights_only=True))
    program = torch.export.export(network, (images(1),))
    torch.testing.assert_close(program.module()(images(1)), network(images(1)))


def test_heads_with_shared_keys_go_as_one() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(6, 24), nn.Linear(6, 12), nn.Linear(6, 12)
            self.out = nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (own(x).unflatten(-1, (-1, 4)).transpose(1, 2) for own in (self.query, self.key, self.value))
            seen = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.out(seen.transpose(1, 2).flatten(2))

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Heads().eval()
        x = torch.randn(2, 5, 6)
    (heads,) = find_sets(model, [x]).sets
    assert heads.num_units == 3
    assert {(axis.tensor, axis.indices.shape[1]) for axis in heads.axes if axis.dim == 0} == {
        *(("query.weight", 8), ("key.weight", 4), ("value.weight", 4)),
        *(("query.bias", 8), ("key.bias", 4), ("value.bias", 4)),
    }
    smaller = remove_(copy.deepcopy(model), [heads], {"query": [1]})
    torch.testing.assert_close(smaller(x), mask_(model, [heads], {"query": [1]})(x))
    assert smaller.query.out_features == 16


class FixedWidth(nn.Module):
    """Code that holds a width as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)).view(-1, 8))))


class HalfUnseen(nn.Module):
    """A cut at a fixed place, and an operation that is not supported."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.sorted, self.last = nn.Linear(4, 8), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.sorted(self.cut(x)[:, 2:5]).sort(dim=1).values)


def test_channels_go_through_padding_of_their_positions_before_a_depthwise_convolution() -> None:
    class Same(nn.Conv2d):
        """Padded as TensorFlow's "SAME": more after the image than before it."""

        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6(), Same(6, 6, 3, 2, groups=6), nn.BatchNorm2d(6),
        nn.ReLU6(), Same(6, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    structure, data = find_sets(network, [images(0)]), images(1)
    assert [(item.name, item.num_units) for item in structure.sets] == [("0", 6), ("6", 4)]
    removed = {"0": [1, 4], "6": [0]}
    with torch.no_grad():
        expected = mask_(copy.deepcopy(network), structure.sets, removed)(data)
        found = remove_(network, structure.sets, removed)(data)
    torch.testing.assert_close(found, expected)


class InTurns(nn.Module):
    """Two layers write every other row each."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.new_empty(len(x), 6, 2 * x.shape[2], x.shape[3])
        rows[:, :, ::2], rows[:, :, 1::2] = self.even(x).relu(), self.odd(x).relu()
        return self.last(rows)


def test_channels_go_through_padding_of_a_single_position() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 6, 8), nn.Conv2d(6, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional.pad(self.first(x).relu(), (1, 1, 1, 1)))

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = Padded().eval()
    assert [(item.name, item.num_units) for item in find_sets(network, [images(0)]).sets] == [("first", 6)]


def test_what_cannot_be_removed_is_named_with_the_reason() -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        fixed, unseen, written = FixedWidth().eval(), HalfUnseen().eval(), InTurns().eval()
    structure = find_sets(fixed, [torch.zeros(2, 4)])
    assert [item.name for item in structure.sets] == ["second"]
    assert "does not run without some" in structure.kept["first"]
    structure = find_sets(unseen, [torch.ones(2, 4)])
    assert structure.sets == ()
    assert "hard-coded" in structure.kept["cut"]
    assert "aten.sort is not supported" in structure.kept["sorted"]
    assert structure.kept["last"] == "it reaches the output"
    kept = find_sets(written, [images(0)]).kept
    assert kept["even"] == kept["odd"] == "written into a part of a tensor"


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"nothing": [0]}, "no coupled set 'nothing'; there are: 0"),
        ({"0": [8]}, "has units 0..7"),
        ({"0": range(8)}, "one must stay"),
    ],
)
def test_a_wrong_removal_is_refused(removed: dict[str, list[int]], said: str) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    sets = find_sets(network, [torch.zeros(2, 4)]).sets
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ModelError, match=said):
        remove_(network, sets, removed)
    assert all(torch.equal(own, before[name]) for name, own in network.state_dict().items())
