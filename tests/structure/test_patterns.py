"""Patterns of layers and the channels that several layers share: no layer changes that must not, and each is named."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, measure, prune_channels, prune_quantize
from qcompress.errors import NoChannelsError

HALF, QUARTER = prune_channels(keep=(0.5,)), prune_channels(keep=(0.25,))


class Residual(nn.Module):
    """The outputs of the stem and of `b` are added; a norm and a depthwise convolution pass those of `a` on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.each = nn.BatchNorm2d(12), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.b, self.head, self.last = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.b(self.each(self.norm(self.a(x)).relu()).relu())
        out: Tensor = self.last(self.head(x.relu().mean((2, 3))).relu())
        return out


def network() -> Residual:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Residual().eval()


def images() -> list[Tensor]:
    return list(torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0)).split(8))


def sets(options: Any = HALF, **patterns: Any) -> tuple[list[str], dict[str, str]]:
    measurement = measure(network(), images(), options, loss="mse", **patterns)
    return [item.name for item in measurement.sets], {item.name: item.reason for item in measurement.skipped}


@pytest.mark.parametrize(("skip", "left"), [
    ("stem", ["a", "head"]), ("b", ["head"]), ("norm", ["stem", "head"]), ("last", ["stem", "a"]),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in [("a", ["head"]), ("each", ["stem", "head"]), ("head", ["a"])]),
])  # fmt: skip
def test_nothing_of_a_skipped_layer_changes(skip: str, left: list[str]) -> None:
    found, reasons = sets(skip=skip)
    assert found == left
    assert all(f"left out by skip={skip!r}" in reasons[name] for name in {"stem", "a", "head"} - {*left})
    model = network()
    small = compress(model, images(), budget={"bytes": 0.98}, options=HALF, skip=skip, loss="mse", time_limit=2).model
    own, other = (item.get_submodule(skip).state_dict() for item in (small, model))
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_set_is_on_offer_where_all_layers_that_make_it_are() -> None:
    assert sets(only="a")[0] == ["a"]
    assert sets(only=("a", "stem"))[0] == ["a"]
    assert sets(only=("stem", "b"))[0] == ["stem"]
    for only, other in (("stem", "b"), ("b", "stem")):
        with pytest.raises(NoChannelsError, match=f"stem: left out by only=( .'{other}', which makes them as well)?"):
            sets(only=only)
    model = network()
    small = compress(model, images(), budget={"bytes": 0.98}, options=HALF, only="a", loss="mse", time_limit=2).model
    for name in ("stem", "head", "last"):
        assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)


@pytest.mark.parametrize(("options", "left"), [
    ({"b": HALF, "*": HALF + QUARTER}, ["stem", "a", "head"]),
    ({"b": HALF, "*": QUARTER}, ["a", "head"]),
    ({"b": prune_quantize(bits=(8,), sparsity=(0,)), "*": HALF}, ["a", "head"]),
    ({"stem": HALF, "a": HALF}, ["a"]),
])  # fmt: skip
def test_what_all_layers_that_make_a_set_have_in_common_is_on_offer(options: Any, left: list[str]) -> None:
    found, reasons = sets(options)
    assert found == left
    said = "no pattern of the options matches its name ('b'" if "*" not in options else "for all of 'stem', 'b'"
    assert "stem" in found or said in reasons["stem"]
