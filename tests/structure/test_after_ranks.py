"""Smaller networks whose layers are replaced by factors afterwards: saved, loaded, and made smaller again."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompress import Result, compress, load_compressed, low_rank, prune_channels, prune_quantize, save_compressed
from qcompress.compressed.record import record_of
from qcompress.errors import ArtefactError

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
    with pytest.raises(ArtefactError, match=r"compressed twice is loaded into the result of the first time") as raised:
        load_compressed(saved.path, network)
    assert "None" not in str(raised.value)
    loaded = load_compressed(saved.path, lambda: copy.deepcopy(factored))
    with torch.no_grad():
        assert torch.equal(loaded(DATA[0]), again(DATA[0]))


def test_a_result_that_takes_more_bytes_than_the_codes_of_the_given_model_is_warned_of() -> None:
    bits = prune_quantize(bits=(4,), sparsity=(0,))
    coded = compress(network(), DATA, budget={"bytes": 0.2}, options=bits, time_limit=1).model
    told = [text for text in narrower(coded).report.warnings if "compressed to" in text]
    assert len(told) == 1
    both = compress(coded, DATA, budget={"bytes": 0.2}, options=prune_channels(keep=(0.75,)) + bits, time_limit=1)
    assert not [text for text in both.report.warnings if "compressed to" in text]
    assert not [text for text in narrower(network()).report.warnings if "compressed to" in text]
