"""Layers whose weight is not their rows ``(out, in)``: the file turns the codes into what the graph reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.traces import traced_once
from tests.engines.test_onnxruntime import EXACT, FLOAT, exported, operators
from tests.measurements import Chain

OPTIONS = (
    qcompress.prune_quantize(bits=(8,), sparsity=(0,)),
    qcompress.prune_quantize(bits=(4,), group_size=16, symmetric=False),
)


def inputs_first(inputs: int, outputs: int) -> nn.Module:
    """A Linear layer of transformers, whose weight is ``(in, out)``."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.weight)
    return layer


class Twice(nn.Module):
    """A bilinear layer of an input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(32, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


class Elsewhere(nn.Module):
    """A layer, and a function that reads its weight in another way."""

    def __init__(self, layer: nn.Module, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.function(x, self.layer.weight)


SQUARE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "inputs first": (lambda: inputs_first(32, 32), (3, 5, 32)),
    "inputs first, not square": (lambda: inputs_first(48, 20), (3, 5, 48)),
    "inputs first, multiplied as it is": (lambda: Elsewhere(inputs_first(32, 32), nn.functional.linear), (3, 32)),
    "kernel, looked up": (
        lambda: Elsewhere(nn.Conv1d(32, 32, 3, padding=1), lambda x, w: w[x[0, 0, :2].long() * 0].sum()),
        (3, 32, 6),
    ),
    "convolution": (lambda: nn.Conv1d(32, 32, 1), (3, 32, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(32, 32, 1), (3, 32, 6)),
    "transposed, in groups": (lambda: nn.ConvTranspose2d(32, 32, 3, groups=2), (3, 32, 4, 4)),
    "bilinear": (Twice, (3, 32)),
}


@pytest.mark.parametrize("kind", SQUARE)
def test_the_file_gives_the_outputs_of_the_layer(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = SQUARE[kind]
    model, batch = Chain(make()).eval(), torch.randn(shape)
    with traced_once():
        for options in OPTIONS:
            smaller = exported(model, batch, options, tmp_path / "small.onnx")
            found, wanted = EXACT.run(tmp_path / "small.onnx", [batch]).outputs[0], smaller(batch).detach()
            torch.testing.assert_close(found, wanted, atol=FLOAT * float(wanted.abs().max()), rtol=0)
            assert not torch.equal(wanted, model(batch))


def test_the_layers_of_gpt2_are_right_in_the_file(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    words: Any = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 61, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, **words)).eval()
    batch = torch.randint(61, (8, 9))
    smaller = exported(model, batch, OPTIONS[0], tmp_path / "small.onnx")
    assert "Transpose" in operators(tmp_path / "small.onnx")
    assert qcompress.verify(tmp_path / "small.onnx", smaller, [batch], target=EXACT, memory=False).ok
