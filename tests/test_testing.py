"""The checks for transforms and engines of others notice what is broken."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from qcompress.errors import OptionsError
from qcompress.options import OFFERS, transform_from_json
from qcompress.testing import CheckError, check_engine, check_transform
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from qcompress.transforms.quantize.whole_filters import PruneFilters
from tests.engines.toy import Toy


@pytest.mark.parametrize(
    "transform",
    [
        PruneQuantize(3, compensated=True),
        GroupWise(4, group_size=4),
        PruneFilters(4, 1),
        LowRank(ranks=(2,)),
        IntegerProduct(dynamic=True),
    ],
    ids=lambda own: own.label,
)
def test_our_own_transforms_pass(transform):
    check_transform(transform)


@dataclass(frozen=True)
class Larger(PruneQuantize):
    kind: ClassVar[str] = "broken"

    def size_bytes(self, target: Target) -> int:
        return super().size_bytes(target) + 1


@dataclass(frozen=True)
class Other(PruneQuantize):
    kind: ClassVar[str] = "broken"

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        return -super().decode(stored, target)


@dataclass(frozen=True)
class Writing(PruneQuantize):
    kind: ClassVar[str] = "broken"

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        stored = super().encode(weight)
        weight.rows.zero_()
        return stored


@pytest.mark.parametrize(
    ("broken", "message"),
    [(Larger, "size_bytes says"), (Other, "bit for bit"), (Writing, r"bit for bit|changed the weight")],
)
def test_a_transform_that_breaks_its_word_is_named(broken, message, monkeypatch):
    monkeypatch.setitem(OFFERS, "broken", broken)
    with pytest.raises(CheckError, match=message):
        check_transform(broken(4))


REMEMBERS = """
from dataclasses import dataclass
from typing import ClassVar

from qcompress.transforms.quantize.prune_quantize import PruneQuantize

SCALES = {}


@dataclass(frozen=True)
class Remembers(PruneQuantize):
    kind: ClassVar[str] = "remembers"

    def size_bytes(self, target):
        return super().size_bytes(target) - 4 * target.channels

    def encode(self, weight):
        stored = super().encode(weight)
        SCALES[weight.target.channels, weight.target.per_channel] = stored.pop("scales")
        return stored

    def decode(self, stored, target):
        return super().decode({**stored, "scales": SCALES[target.channels, target.per_channel]}, target)
"""


def test_a_transform_that_keeps_what_it_needs_in_memory_is_named(tmp_path, monkeypatch):
    (tmp_path / "remembering.py").write_text(REMEMBERS)
    info = tmp_path / "remembering-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: remembering\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qcompress.transforms]\nremembers = remembering:Remembers\n")
    monkeypatch.syspath_prepend(tmp_path)
    from remembering import Remembers

    with pytest.raises(
        CheckError, match=r"decode depends on more than .* cannot be loaded in a new process .* cannot be decoded"
    ):
        check_transform(Remembers(4))


def test_a_transform_that_no_file_can_name_is_refused():
    with pytest.raises(OptionsError, match="no transform has the kind 'broken'; known: keep, prune_quantize"):
        check_transform(Larger(4))
    with pytest.raises(OptionsError, match="no transform has the kind 3"):
        transform_from_json({"kind": 3})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_an_engine_is_checked_in_bytes_and_outputs():
    data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(0))]
    check_engine(Toy(factory=network), network, data)
    with pytest.raises(CheckError, match="differ from the emulation's"):
        check_engine(Toy(factory=network, wrong=0.5), network, data)
    with pytest.raises(CheckError, match="instead of the predicted"):
        check_engine(Toy(factory=network, more=1), network, data)
