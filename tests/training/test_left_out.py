"""Fine-tuning in `compress` leaves the layers as they are that are not to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, low_rank, measure, prune_channels, prune_quantize

CODES = prune_quantize(bits=(3, 4), sparsity=(0,))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)
        )


def batches() -> list[Tensor]:
    return [torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def changed(folder: Path | None = None, **given: Any) -> set[str]:
    """Paths of the layers whose weights or biases are not the original's."""
    result = compress(
        network(), batches(), solver="greedy", finetune_steps=16, learning_rate=0.003, folder=folder, **given
    )
    assert result.report.loss_finetuned is not None
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    after = dict(result.model.named_parameters())
    return {
        name.partition(".")[0]
        for name, before in network().named_parameters()
        if name not in after or not torch.equal(before, after[name])
    }


@pytest.mark.parametrize(
    ("options", "share"),
    [(CODES, 0.5), pytest.param(low_rank(ratios=(0.5,)), 0.9, marks=pytest.mark.slow)],
    ids=["codes", "low rank"],
)
@pytest.mark.parametrize(
    ("left", "may_change"),
    [({"skip": "5"}, {"0", "2", "3"}), ({"only": ("0", "2")}, {"0", "2"}), ({}, {"0", "2", "3", "5"})],
    ids=["skip", "only", "all"],
)
def test_layers_left_out_are_not_trained(
    options: Any, share: float, left: Any, may_change: set[str], tmp_path: Path
) -> None:
    given = {"budget": {"bytes": share}, "options": options, **left}
    for folder in (None, tmp_path, tmp_path):
        assert changed(folder, **given) == may_change


def test_layers_without_a_pattern_are_not_trained() -> None:
    assert changed(budget={"bytes": 0.9}, options={"0": CODES}) == {"0"}


def test_layers_that_an_earlier_measurement_left_out_are_not_trained() -> None:
    for left in ({"skip": "5"}, {"only": ("0", "2")}):  # norms are no layers that it names
        measurement = measure(network(), batches(), CODES, **left)
        assert changed(budget={"bytes": 0.5}, measurement=measurement) == {"0", "2", "3"}


def test_an_earlier_measurement_of_channels_leaves_no_layer_untrained() -> None:
    measurement = measure(network(), batches(), prune_channels(), only="0")
    assert changed(budget={"macs": 0.8}, measurement=measurement) == {"0", "2", "3", "5"}


def test_layers_that_lost_inputs_are_trained_though_only_others_were_asked_for() -> None:
    assert changed(budget={"macs": 0.8}, options=prune_channels(), only="0") == {"0", "2"}
