"""Batch norms with a faster backward pass give the same outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn

from qcompress.measuring.methods.norms import quick_norms


def trained(norm: nn.Module) -> nn.Module:
    """The norm with other numbers than its first ones, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5
    return norm.requires_grad_(False).eval()


def gradient(model: nn.Module, given: Tensor, *, quick: bool) -> tuple[Tensor, Tensor, str]:
    given = given.clone().requires_grad_(True)
    if quick:
        with quick_norms(model):
            output = model(given)
    else:
        output = model(given)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    assert output.grad_fn is not None
    return output.detach(), torch.autograd.grad(output, given, probe)[0], output.grad_fn.name()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(3, eps=0.1), (5, 3, 4)),
        (nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (nn.BatchNorm2d(3, affine=False), (2, 3, 4, 4)),
        (nn.BatchNorm3d(3), (2, 3, 2, 4, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_the_same(norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = trained(norm).to(dtype)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output, actual, name = gradient(model, given, quick=True)
    expected_output, expected, _ = gradient(model, given, quick=False)
    assert "Norm" in name
    assert torch.equal(output, expected_output)
    assert actual.dtype == dtype
    size = float(expected.abs().max())
    assert float((actual - expected).abs().max()) <= 8 * torch.finfo(dtype).eps * size


def test_norms_of_the_batch_and_norms_that_learn_stay_as_they_are() -> None:
    given = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    batch, learning = (
        nn.BatchNorm1d(3, track_running_stats=False).requires_grad_(False).eval(),
        nn.BatchNorm1d(3).eval(),
    )
    for model in (batch, learning):
        assert "NativeBatchNorm" in gradient(model, given, quick=True)[2]
    with quick_norms(learning):
        learning(given).sum().backward()
    weight = learning.weight.grad
    assert weight is not None
    assert bool(weight.any())


def test_an_activation_in_place_and_vmap_keep_working() -> None:
    norm = trained(nn.BatchNorm1d(3))
    given = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(norm, nn.ReLU(inplace=True))
    assert torch.allclose(gradient(model, given, quick=True)[1], gradient(model, given, quick=False)[1])

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            mapped: Tensor = torch.vmap(self.norm)(x.unflatten(0, (2, 3)))
            return mapped.flatten(0, 1)

    assert torch.allclose(gradient(Mapped(), given, quick=True)[1], gradient(norm, given, quick=False)[1])
