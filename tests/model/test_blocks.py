"""Repeated blocks: found as the list with most weights, or named, with each weight in one block."""

import pytest
from torch import nn

from qcompress.errors import ModelError
from qcompress.model.blocks import blocks_of


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(2, 2)])
        self.layers = nn.ModuleList([block(), block()])
        self.one, self.two = block(), block()


def test_the_list_of_one_class_with_most_weights_is_found_or_another_named() -> None:
    assert blocks_of(Named()) == ("layers.0", "layers.1")
    assert blocks_of(Named(), "small") == ("small.0",)
    assert blocks_of(Named(), ("one", "two")) == ("one", "two")
    assert blocks_of(nn.Sequential(block(), block())) == ("0", "1")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("layer", r"found 'layer'; the model has 'small', 'layers', 'layers\.0'"),
        (("one", "three"), r"paths of modules of the model, found \['three'\]"),
        ((), r"found \[\]"),
        (("layers", "layers.0"), r"'layers' and 'layers\.0' share a weight"),
    ],
)
def test_names_that_are_no_blocks_are_told(named: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        blocks_of(Named(), named)


def test_a_module_used_twice_is_no_two_blocks() -> None:
    shared = block()
    with pytest.raises(ModelError, match="'0' and '1' share a weight"):
        blocks_of(nn.Sequential(shared, shared))


def test_a_model_without_repeated_blocks_is_to_be_loaded_whole() -> None:
    with pytest.raises(ModelError, match="no list of repeated blocks"):
        blocks_of(nn.Bilinear(2, 2, 2))
