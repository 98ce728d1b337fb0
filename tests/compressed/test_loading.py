"""What is no function for the original model, or makes one without numbers, is refused as such."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from qcompress import compress, load_compressed, save_compressed
from qcompress.errors import ArtefactError, OptionsError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = compress(network(), [torch.randn(8, 16)], budget={"bytes": 0.6}, solver="greedy").model
    return save_compressed(model, tmp_path / "small.safetensors").path


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_in_place_of_a_function_is_refused(file: Path, packed: bool) -> None:
    for wrong in (network(), "Net", None):
        with pytest.raises(OptionsError, match=f"takes a function that makes the original.* {type(wrong).__name__}$"):
            load_compressed(file, cast(Any, wrong), packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_without_numbers_is_refused(file: Path, packed: bool) -> None:
    with pytest.raises(ArtefactError, match=r"'0\.weight' of the given model is on the meta device"):
        load_compressed(file, lambda: network().to("meta"), packed=packed)

    def partly() -> nn.Module:
        model = network()
        model[1].to("meta")
        return model

    with pytest.raises(ArtefactError, match=r"'1\.weight' of the given model is on the meta device"):
        load_compressed(file, partly, packed=packed)
