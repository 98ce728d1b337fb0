"""The emulation of MatMulNBits at accuracy level 4 gives the engine's outputs up to the order of additions."""

from pathlib import Path

import pytest
import torch
from torch import nn

import qcompress
from benchmarks.traces import traced_once
from qcompress.engines.legal import for_engine
from qcompress.engines.onnx_emulation import rounding_inputs
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.engines.verify import compared
from tests.measurements import measured, solution

ENGINE, IN_FLOAT = OnnxRuntime(threads=1), OnnxRuntime(threads=1, accuracy_level=1)
SAME = 1e-5  # float32 sums of up to 200 products, in another order
OPTIONS = {
    "4 bits in groups of 16": qcompress.prune_quantize(bits=(4,), group_size=16),
    "8 bits with zero points": qcompress.prune_quantize(bits=(8,), group_size=128, symmetric=False),
    "2 bits in groups of 16, in float32": qcompress.prune_quantize(bits=(2,), group_size=16),
    "2 bits": qcompress.prune_quantize(bits=(2,), group_size=32),
    "factors": qcompress.low_rank(ratios=(0.5,), whitened=False).then(qcompress.prune_quantize((8,), group_size=32)),
}


def test_the_emulation_rounds_inputs_as_the_engine_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 96), nn.GELU(), nn.Linear(96, 33)).eval()  # blocks that are not full
    x = torch.cat([torch.randn(8, 200), torch.zeros(1, 200)])
    with traced_once():
        for name, options in OPTIONS.items():
            legal = for_engine(ENGINE, model, measured(model, x, options), x)
            smaller = qcompress.apply(model, legal, solution([len(on_offer) - 1 for on_offer in legal.transforms]))
            file = qcompress.export(smaller, tmp_path / "small.onnx", target=ENGINE, example=x)
            run = ENGINE.run(file.path, [x])
            assert compared(run, ENGINE.emulate(smaller, [x])).relative < SAME, name
            in_float = compared(run, IN_FLOAT.emulate(smaller, [x])).relative < SAME
            assert in_float == name.endswith("float32"), name


def test_the_hooks_are_gone_afterwards() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8)).eval(), torch.randn(4, 32)
    options = qcompress.prune_quantize(bits=(4,), group_size=16)
    smaller = qcompress.apply(model, measured(model, x, options), solution([1]))
    before = smaller(x)
    with pytest.raises(RuntimeError, match="stop"), rounding_inputs(smaller, 4):
        assert not torch.equal(smaller(x), before)
        raise RuntimeError("stop")
    assert torch.equal(smaller(x), before)
    with rounding_inputs(smaller, 1):
        assert torch.equal(smaller(x), before)
