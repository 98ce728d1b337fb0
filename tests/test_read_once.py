"""Data that can be read once, though they have a length or are no generator, are refused as such."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

import qcompress
from qcompress.errors import DataError
from qcompress.model.forward import checked_data, read_data
from qcompress.model.passes import Passes

OPTIONS = qcompress.prune_quantize(bits=(2, 4), sparsity=(0,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).eval()


def batches(count: int = 4) -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(index)) for index in range(count)]


class Shown:
    """Yields the rest of what it holds, as tqdm around a generator does."""

    def __init__(self, count: int = 4) -> None:
        self.batches, self.count = iter(batches(count)), count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches


class Once(IterableDataset[Tensor]):
    def __init__(self) -> None:
        self.batches = iter(batches())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(list(self.batches))


def compress(data: Any = None, **more: Any) -> qcompress.Result:
    given = batches() if data is None else data
    return qcompress.compress(network(), given, budget={"bytes": 0.6}, options=OPTIONS, time_limit=1, **more)


@pytest.mark.parametrize(
    "make", [Shown, lambda: Shown(1), lambda: Shown(40), lambda: DataLoader(Once(), batch_size=None)]
)
@pytest.mark.parametrize("guard", [True, False])
def test_calibration_data_that_can_be_read_once_are_refused(make: Callable[[], Any], guard: bool) -> None:
    with pytest.raises(DataError, match="data can be read only once"):
        compress(make(), guard=guard)
    with pytest.raises(DataError, match="data can be read only once"):
        qcompress.measure(network(), make(), OPTIONS)


@pytest.mark.parametrize("name", ["validation", "batch_norm_data"])
def test_other_data_that_can_be_read_once_are_refused_before_measuring(name: str) -> None:
    def measured(_: object) -> None:
        raise AssertionError

    with pytest.raises(DataError, match=f"{name} can be read only once"):
        compress(**{name: Shown()}, on_measure=measured)


def test_applying_reads_all_data_for_batch_norms_or_refuses_them() -> None:
    result = compress()
    problem = result.problem
    with pytest.raises(DataError, match="batch_norm_data can be read only once"):
        qcompress.apply(network(), result.measurement, qcompress.solve(problem), batch_norm_data=Shown())


def test_a_loader_is_read_as_often_as_before() -> None:
    loader = DataLoader(torch.cat(batches()), batch_size=16)
    assert compress(loader).report.loss_predicted == compress(batches()).report.loss_predicted
    assert compress(validation=loader, batch_norm_data=loader).report.loss_validation is not None


def test_a_list_is_neither_wrapped_nor_read() -> None:
    data = batches()
    assert read_data(data, "data") is data
    wrapped = checked_data(DataLoader(data), "data")
    assert checked_data(wrapped, "data") is wrapped
    assert isinstance(wrapped, Passes)


@pytest.mark.parametrize("sampler", [False, True])
def test_a_loader_with_a_generator_of_its_own_is_read_in_the_same_order_when_a_step_is_repeated(sampler: bool) -> None:
    """As one is that shuffles by torch's own; and the generator is left as it was."""
    own = torch.Generator().manual_seed(5)
    data = torch.arange(20.0)
    drawn = RandomSampler(data, generator=own) if sampler else None
    loader = DataLoader(data, batch_size=4, shuffle=None if sampler else True, sampler=drawn, generator=own)
    before = own.get_state()

    def step() -> list[list[float]]:
        torch.manual_seed(0)
        return [torch.cat(list(checked_data(loader))).tolist() for _ in range(3)]

    first = step()
    assert step() == first
    assert first[0] != first[1]
    assert torch.equal(own.get_state(), before)


def test_fine_tuning_that_was_cut_goes_on_alike_with_a_loader_that_has_a_generator(tmp_path: Path) -> None:
    class CutError(Exception):
        pass

    def run(folder: Path, cut: bool = False) -> dict[str, Tensor]:
        def tell(progress: Any) -> None:
            if cut:
                raise CutError

        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(torch.cat(batches()), batch_size=8, shuffle=True, generator=generator)
        result = compress(loader, validation=batches(1), finetune_steps=8, folder=folder, on_finetune=tell)
        return dict(result.model.state_dict())

    whole = run(tmp_path / "whole")
    with pytest.raises(CutError):
        run(tmp_path / "cut", cut=True)
    resumed = run(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
