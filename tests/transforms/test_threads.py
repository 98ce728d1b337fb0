"""Rows shared by threads: every row once, and the same codes for any number of threads."""

from collections.abc import Iterator

import pytest
import torch

from qcompress.transforms import threads
from qcompress.transforms.base import Target, Transform, Weight
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

ROWS, PER_ROW = 37, 96


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads for every handful of rows."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "LEAST", 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("rows", [0, 1, 3, 50])
def test_every_row_is_in_one_range(rows: int) -> None:
    torch.set_num_threads(3)
    seen: list[int] = []
    threads.over_rows(lambda start, stop: seen.extend(range(start, stop)), rows, per_row=8)
    assert sorted(seen) == list(range(rows))


@pytest.mark.usefixtures("_eager")
def test_an_error_in_a_thread_is_raised() -> None:
    torch.set_num_threads(3)
    with pytest.raises(ZeroDivisionError):
        threads.over_rows(lambda start, stop: 1 // (stop - ROWS), ROWS, per_row=8)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize(
    "transform",
    [
        PruneQuantize(bits=3),
        PruneQuantize(bits=4, sparsity=0.5, compensated=True),
        GroupWise(bits=3, group_size=16, symmetric=False),
        GroupWise(bits=4, group_size=16, compensated=True),
    ],
    ids=lambda transform: transform.label,
)
def test_codes_do_not_depend_on_the_threads(transform: Transform) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, inputs = (torch.randn(count, PER_ROW, generator=generator) for count in (ROWS, 500))
    target = Target(layer="Linear", channels=ROWS, per_channel=PER_ROW, dtype=torch.float32, macs=ROWS * PER_ROW)
    moments = (inputs.T @ inputs / len(inputs)).double()
    stored = []
    for count in (1, 3):
        weight = Weight(rows, target, moments, len(inputs))
        torch.set_num_threads(1)  # products of matrices may round differently on several
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda count=count: count)
            stored.append(transform.encode(weight))
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
