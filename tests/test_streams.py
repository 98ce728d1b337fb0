"""Data without a length gives the same numbers as the list of its batches."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import qcompress
from qcompress.model.passes import number_of


class Stream(IterableDataset):
    """Samples that are drawn while they are read."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(12, generator=generator) for _ in range(40))


class Unsized:
    """Batches of a class that declares a length and has none."""

    def __iter__(self):
        return iter(DataLoader(Stream(), batch_size=8))

    def __len__(self):
        raise TypeError


class Undecided(Stream):
    """Samples of a class that leaves the length to others."""

    def __len__(self):
        raise NotImplementedError


STREAMS = {"loader": lambda: DataLoader(Stream(), batch_size=8), "unsized": Unsized}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).eval()


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_has_no_number_of_batches(name):
    assert number_of(STREAMS[name]()) is None
    assert number_of(DataLoader(torch.ones(10, 12), batch_size=4)) == 3


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_measuring_a_stream_is_measuring_its_batches(name, method):
    stream, seen = STREAMS[name](), []
    options = qcompress.prune_quantize(bits=(2, 8), sparsity=(0,))
    found = qcompress.measure(network(), stream, options, method=method, on_progress=seen.append)
    expected = qcompress.measure(network(), [*stream], options, method=method)
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-12)
    passes = [progress for progress in seen if "alone" not in progress.unit]
    assert [progress.batches for progress in passes] == [1, 2, 3, 4, 5]
    assert {progress.total_batches for progress in passes} == {None}


def test_a_length_that_a_class_leaves_open_is_not_needed():
    options = qcompress.prune_quantize(bits=(4,), sparsity=(0,))
    open_, closed = (
        qcompress.measure(network(), DataLoader(own(), batch_size=8), options) for own in (Undecided, Stream)
    )
    np.testing.assert_array_equal(open_.cost, closed.cost)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_compressed(name):
    report = qcompress.compress(network(), STREAMS[name](), budget={"bytes": 0.4}, time_limit=2, guard=False).report
    expected = qcompress.compress(network(), [*STREAMS[name]()], budget={"bytes": 0.4}, time_limit=2, guard=False)
    assert report.loss_predicted == pytest.approx(expected.report.loss_predicted)
    assert report.loss_measured == pytest.approx(expected.report.loss_measured)


@pytest.mark.parametrize("name", STREAMS)
def test_a_training_on_a_stream_that_was_cut_goes_on_to_the_last_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qcompress.training.finetune"], "SAVE_EVERY_S", -1)
    teacher, student, stream = network(), network(1), STREAMS[name]()

    def press(progress):
        if progress.step >= 9:  # in the second pass over the data
            raise KeyboardInterrupt

    whole = qcompress.finetune(student, stream, 20, teacher=teacher)
    listed = qcompress.finetune(student, [*stream], 20, teacher=teacher)
    qcompress.finetune(student, stream, 20, teacher=teacher, cache=tmp_path / "run", on_progress=press)
    resumed = qcompress.finetune(student, stream, 20, teacher=teacher, cache=tmp_path / "run")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
        assert torch.equal(listed.state_dict()[key], value)
    assert qcompress.mean_loss(teacher, whole, stream) < qcompress.mean_loss(teacher, student, stream)
