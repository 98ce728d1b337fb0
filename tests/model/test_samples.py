"""Held-out samples are never among those that something is fitted to, however the data comes."""

import itertools
from collections import Counter, UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qcompress import compress, prune_quantize
from qcompress.cautions import of_split
from qcompress.model.losses import as_loss
from qcompress.model.samples import MAX_KEPT, MIN_SAMPLES, Split, split_samples


def numbered(count: int, width: int = 3) -> Tensor:
    """Rows that can be told apart."""
    return torch.arange(count * width, dtype=torch.float32).view(count, width)


def linear(width: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 2)


def rows(batches: Any) -> list[tuple[float, ...]]:
    return [tuple(row) for batch in batches for row in batch.tolist()]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_every_sample_is_on_one_side_and_a_quarter_is_kept_aside(sizes: list[int]) -> None:
    total = sum(sizes)
    data = list(numbered(total).split(sizes))
    split = split_samples(linear(), data)
    if total < MIN_SAMPLES:
        assert (split.kept, split.num_kept) == ((), 0)
        assert split.calibration is data
        assert f"{total} samples are too few" in split.why_not
        return
    kept, rest = rows(split.kept), rows(split.calibration)
    assert sorted(kept + rest) == rows(data)
    assert len(kept) == split.num_kept == -(-total // 4)
    assert (split.num_samples, split.unit, split.why_not) == (total, "samples", "")


def test_a_loader_that_shuffles_keeps_the_same_samples_aside_on_every_pass() -> None:
    data = DataLoader(numbered(40), batch_size=7, shuffle=True)
    split = split_samples(linear(), data)
    passes = [rows(split.calibration) for _ in range(3)]
    assert passes[0] != passes[1]  # it does shuffle
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert sorted(passes[0] + rows(split.kept)) == rows([numbered(40)])


def test_the_order_of_the_samples_does_not_matter_and_copies_of_a_sample_stay_together() -> None:
    samples = numbered(20)
    twice = torch.cat([samples, samples])[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    split = split_samples(linear(), list(twice.split(8)))
    kept, rest = set(rows(split.kept)), set(rows(split.calibration))
    assert not kept & rest
    assert kept == set(rows(split_samples(linear(), [samples]).kept))


def test_at_most_so_many_are_kept_aside() -> None:
    assert split_samples(linear(), [numbered(5 * MAX_KEPT)]).num_kept == MAX_KEPT


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, ids: Tensor, shift: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(ids + shift) * scale


Pair = namedtuple("Pair", ["inputs", "labels"])


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_cut_where_it_has_a_row_for_every_sample(kind: Any) -> None:
    data = [kind({"ids": numbered(12), "shift": torch.ones(1, 3), "scale": 2.0})]
    split = split_samples(Named(), data, lambda model, batch: model(**batch))
    (kept,), (rest,) = split.kept, split.calibration
    assert type(kept) is kind
    assert (len(kept["ids"]), len(rest["ids"])) == (3, 9)
    assert kept["shift"] is data[0]["shift"]
    assert kept["scale"] == 2.0


@pytest.mark.parametrize("kind", [tuple, list, lambda entries: Pair(*entries)])
def test_targets_and_names_go_with_their_inputs(kind: Any) -> None:
    names = [str(index) for index in range(12)]
    batch = kind([numbered(12), (torch.arange(12), names)])
    split = split_samples(linear(), [batch])
    (kept,) = split.kept
    assert type(kept) is type(batch)
    assert kept[1][0].tolist() == [int(name) for name in kept[1][1]]
    assert rows([kept[0]]) == [rows([batch[0]])[int(name)] for name in kept[1][1]]


def test_one_sample_a_batch_needs_no_cutting() -> None:
    split = split_samples(linear(), list(numbered(8).split(1)))
    assert (split.num_kept, len(split.kept), len(list(split.calibration))) == (2, 2, 6)


class TimeMajor(nn.Module):
    """Takes ``(time, samples, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][-1]


class Centred(nn.Module):
    """Samples depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Noisy(nn.Module):
    """Draws random numbers, also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x + 1, 0.5, training=True)


class Tracking(nn.Module):
    """Subtracts an average that it updates in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.mean


@pytest.mark.parametrize(
    ("make_model", "batch", "reason"),
    [
        (Noisy, numbered(6), "it draws random numbers, which differ with the number of samples"),
        (Tracking, numbered(6), "depend on each other, perhaps through mean, which it changes while it runs"),
        (TimeMajor, numbered(6 * 6).view(6, 6, 3), "its rows are not samples"),
        (TimeMajor, numbered(5 * 6).view(5, 6, 3), "no tensor of the first batch has as many rows"),
        (Centred, numbered(6), "samples depend on each other"),
        (lambda: nn.Flatten(0), numbered(6), "no tensor of the first batch has as many rows"),
        (lambda: nn.Unflatten(0, (2, 3)), numbered(6), "no tensor of the first batch has as many rows"),
    ],
)
def test_where_rows_are_no_samples_whole_batches_of_a_list_are_kept_aside(
    make_model: Callable[[], nn.Module], batch: Tensor, reason: str
) -> None:
    model, data = make_model(), [batch + index for index in range(5)]
    split = split_samples(model, data)
    assert (split.unit, split.num_kept, split.num_samples) == ("batches", 2, 5)
    assert reason in split.why_not
    found = [batch.flatten().tolist() for batch in itertools.chain(split.kept, split.calibration)]
    assert sorted(found) == [batch.flatten().tolist() for batch in data]
    alone = split_samples(model, [batch])
    assert (alone.kept, alone.calibration) == ((), [batch])
    assert reason in alone.why_not


@pytest.mark.parametrize("other", [(numbered(8), torch.zeros(8)), {"x": numbered(8)}])
def test_batches_of_different_forms_are_told_as_such(other: Any) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch if isinstance(batch, Tensor) else numbered(8))

    split = split_samples(linear(), [numbered(8), other], forward)
    assert split.why_not.startswith("the batches have different forms")


def test_a_model_that_takes_no_smaller_batch_is_told() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.view(6, 3))

    assert "does not accept a part of a batch" in split_samples(linear(), [numbered(6)], forward).why_not


class Parity(nn.Module):
    """Does something else to batches of an odd size."""

    def forward(self, x: Tensor) -> Tensor:
        return -x if len(x) % 2 else x


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 9, 9), (2, 2, 4, 9, 9)])
def test_both_parts_of_every_batch_that_is_cut_are_compared_with_the_whole(sizes: tuple[int, ...]) -> None:
    data = list(numbered(sum(sizes)).split(sizes))
    split = split_samples(Parity(), data)
    assert "samples depend on each other" in split.why_not
    assert all(any(batch is whole for whole in data) for batch in (*split.calibration, *split.kept))


class Augmented:
    """Other samples on every pass."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.randn(32, 3, generator=self.generator)


def test_data_that_differs_on_every_pass_is_told() -> None:
    split = split_samples(linear(), Augmented())
    assert split.kept == ()
    assert "the data differs from pass to pass" in split.why_not


def test_equal_samples_are_told() -> None:
    split: Split = split_samples(linear(), [torch.ones(8, 3)])
    assert split.kept == ()
    assert "all samples are equal" in split.why_not


@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_equal_samples_take_no_more_than_half_and_as_near_a_quarter_as_they_allow(counts: list[int]) -> None:
    different = numbered(len(counts))
    batch = different.repeat_interleave(torch.tensor(counts), dim=0)
    if len(batch) < MIN_SAMPLES:
        return
    split = split_samples(linear(), [batch])
    kept, rest = Counter(rows(split.kept)), Counter(rows(split.calibration))
    assert not kept & rest
    assert kept + rest == Counter(rows([batch]))
    assert 1 <= split.num_kept == kept.total() <= len(batch) / 2
    missing = split.num_wanted - split.num_kept
    assert all(
        abs(missing) <= abs(missing - count) or split.num_kept + count > len(batch) / 2 for count in rest.values()
    )


def test_a_sample_that_fills_most_of_the_data_leaves_the_others_to_measure_on() -> None:
    batch = numbered(64)
    batch[20:] = 7.0
    split = split_samples(linear(), [batch])
    assert (split.num_kept, split.num_wanted) == (16, 16)


def test_a_share_far_from_a_quarter_is_told_in_the_report() -> None:
    network = nn.Sequential(linear(), nn.Tanh(), nn.Linear(2, 3))
    half = numbered(2).repeat(16, 1) / 8
    (warning,) = of_split(split_samples(network, [half]), given=False)
    assert "16 of 32 samples were held out instead of 8, as equal samples are held out together" in warning
    assert not list(of_split(split_samples(network, [numbered(32)]), given=False))


def test_samples_of_a_few_kinds_of_which_each_is_too_frequent_are_told() -> None:
    batch = numbered(2).repeat(MAX_KEPT + 1, 1)
    split = split_samples(linear(), [batch])
    assert split.kept == ()
    assert f"the {len(batch)} samples are copies of 2" in split.why_not


def test_copies_in_batches_of_other_sizes_are_not_held_out_beside_them() -> None:
    split = split_samples(linear(), [torch.ones(size, 3) for size in (8, 4, 6, 2)])
    assert split.kept == ()


def weights_beside(loss: Callable[[Tensor, Any], Tensor]) -> tuple[Split, Split]:
    """Batches of four samples with four class weights that only the loss reads, cut without and with the loss."""
    data = [{"x": rows, "w": torch.tensor([1.0, 2.0, 3.0, 4.0])} for rows in numbered(20).split(4)]

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])

    return split_samples(linear(), data, forward), split_samples(linear(), data, forward, as_loss(loss))


def summed(output: Tensor, batch: Any) -> Tensor:
    return output.square().sum(-1) * batch["w"].sum()


def of_classes(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output.repeat(1, 2), torch.arange(4), batch["w"], reduction="none")


def centred(output: Tensor, batch: Any) -> Tensor:
    return (output - output.mean(0)).square().sum(-1)


@pytest.mark.parametrize("loss", [summed, of_classes, centred])
def test_what_only_the_loss_reads_is_cut_if_the_loss_is_the_same_for_parts(loss: Callable[..., Tensor]) -> None:
    without, split = weights_beside(loss)
    assert (without.unit, split.unit, split.num_kept) == ("samples", "batches", 2)
    assert "the loss gives other values for some samples alone than within their batch" in split.why_not
    assert all(len(batch["w"]) == 4 for batch in (*split.kept, *split.calibration))


def test_the_report_tells_that_the_loss_depends_on_the_whole_batch() -> None:
    data = [{"input": rows, "w": torch.tensor([1.0, 2.0, 3.0, 4.0])} for rows in (numbered(20) / 60).split(4)]
    options = prune_quantize(bits=(2, 8), sparsity=(0,))
    report = compress(
        linear(),
        data,
        budget={"bytes": 0.9},
        options=options,
        loss=summed,
        forward=lambda model, batch: model(batch["input"]),
        time_limit=1,
    ).report
    assert any(
        "whole batches were held out, 2 of 5" in warning and "the loss gives" in warning for warning in report.warnings
    )


def test_weights_of_samples_are_cut_with_them() -> None:
    _, split = weights_beside(lambda output, batch: output.square().sum(-1) * batch["w"])
    assert (split.unit, split.why_not) == ("samples", "")


def test_half_precision_is_cut_as_well() -> None:
    model = linear().to(torch.bfloat16)
    assert split_samples(model, [torch.randn(16, 3, dtype=torch.bfloat16)]).num_kept == 4


def test_the_model_is_left_as_it_was() -> None:
    model = linear().train()
    split_samples(model, [numbered(8)])
    assert model.training
    assert all(own.requires_grad for own in model.parameters())
