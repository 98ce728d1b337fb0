"""Smaller networks whose layers are replaced by factors afterwards: saved, loaded, and made smaller again."""

import copy
from pathlib import Path

import torch
from torch import nn

from qcompress import Result, compress, load_compressed, low_rank, prune_channels, save_compressed
from qcompress.compressed.record import record_of

DATA = [torch.randn(48, 16, generator=torch.Generator().manual_seed(0))]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def narrower(model: nn.Module) -> Result:
    return compress(model, DATA, budget={"macs": 0.8}, options=prune_channels(keep=(0.75, 0.5)), time_limit=1)


def test_factors_of_a_smaller_network_are_loaded_into_the_original_architecture(tmp_path: Path) -> None:
    smaller = narrower(network()).model
    factored = compress(smaller, DATA, budget={"macs": 0.7}, options=low_rank(ratios=(0.25, 0.5)), time_limit=1).model
    record = record_of(factored)
    assert record is not None
    assert ("2.weight", 0) in record.cuts
    assert "2.weight" not in dict(factored.named_parameters())
    saved = save_compressed(factored, tmp_path / "factored.st")
    loaded = load_compressed(saved.path, network)
    with torch.no_grad():
        assert torch.equal(loaded(DATA[0]), factored(DATA[0]))
    again = narrower(factored).model
    saved = save_compressed(again, tmp_path / "again.st")
    loaded = load_compressed(saved.path, lambda: copy.deepcopy(factored))
    with torch.no_grad():
        assert torch.equal(loaded(DATA[0]), again(DATA[0]))
