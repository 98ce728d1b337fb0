"""While a model is measured, accelerators compute float32 in full: TensorFloat-32 blurs small differences."""

import pytest
import torch
from torch import nn

import qcompress
from qcompress import prune_quantize

needs_conv = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9")


@needs_conv
@pytest.mark.parametrize("before", ["tf32", "ieee"])
def test_products_and_convolutions_are_in_full_while_measuring_and_as_before_after_it(before):
    """Seen from inside a forward pass, and put back after it."""
    conv, seen = torch.backends.cudnn.conv, []
    unchanged = conv.fp32_precision

    def forward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append((conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return model(batch)

    conv.fp32_precision = before
    try:
        qcompress.measure(
            nn.Linear(8, 4), [torch.randn(16, 8)], prune_quantize(bits=(4,), sparsity=(0,)), forward=forward
        )
        assert set(seen) == {("ieee", "ieee")}
        assert conv.fp32_precision == before
    finally:
        conv.fp32_precision = unchanged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator is here")
def test_an_accelerator_measures_what_the_cpu_measures():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)
    )
    batch = torch.randn(64, 3, 8, 8)
    options = prune_quantize(bits=(2, 4, 8), sparsity=(0,))
    here = qcompress.measure(model, [batch], options)
    there = qcompress.measure(model.cuda(), [batch.cuda()], options)
    torch.testing.assert_close(torch.tensor(there.cost), torch.tensor(here.cost), rtol=1e-3, atol=1e-7)
