"""Low rank for layers that are used several times: the file takes the predicted bytes, which grow with every use."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompress
from tests.engines.test_onnxruntime import EXACT, FLOAT, blanks, exported


class Loop(nn.Module):
    """A layer that is used several times."""

    def __init__(self, cell: nn.Module, uses: int) -> None:
        super().__init__()
        self.a_layer_with_a_long_name, self.uses = cell, uses

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.uses):
            x = torch.tanh(self.a_layer_with_a_long_name(x))
        return x


SLICED = qcompress.low_rank(ratios=(0.5,), kinds=("sliced",), slices=(4,), whitened=False)
RANKS = qcompress.low_rank(ratios=(0.5,), kinds=("channels",), whitened=False)
SPATIAL = qcompress.low_rank(ratios=(0.5,), kinds=("spatial",), whitened=False)
BITS = qcompress.prune_quantize(bits=(4,), group_size=16)


@pytest.mark.parametrize(("options", "uses", "shape", "most"), [
    pytest.param(SLICED, 5, (4, 64), 1600, marks=pytest.mark.slow),
    (SLICED.then(BITS), 5, (2, 3, 2, 64), 1600),
    pytest.param(RANKS, 40, (4, 64), 150, marks=pytest.mark.slow),
    pytest.param(RANKS.then(BITS), 12, (2, 3, 64), 300, marks=pytest.mark.slow),
    (SPATIAL, 12, (2, 16, 5, 5), 700),
])  # fmt: skip
def test_every_use_of_a_low_rank_layer_has_room(
    options: qcompress.Options, uses: int, shape: tuple[int, ...], most: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    padded = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular")
    model, batch = Loop(padded if options is SPATIAL else nn.Linear(64, 64), uses).eval(), torch.randn(shape)
    smaller = exported(model, batch, options, tmp_path / "small.onnx")
    found = EXACT.run(tmp_path / "small.onnx", [batch]).outputs[0]
    torch.testing.assert_close(found, smaller(batch).detach(), atol=10 * FLOAT, rtol=0)
    assert blanks(tmp_path / "small.onnx") <= 200 + most * uses
