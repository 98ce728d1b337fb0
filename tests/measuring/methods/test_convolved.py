"""Many responses of a convolution at once give the products that responses one by one give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress.measuring.methods import convolved
from qcompress.measuring.methods.calls import Call, response
from qcompress.measuring.methods.products import Place, shares

NUM_CHANGES, NUM_PROBES = 3, 2


def called(module: nn.Module, given: Tensor) -> tuple[Call, list[Tensor], list[Tensor]]:
    """A call, gradients of its output, and changes of its weight."""
    generator = torch.Generator().manual_seed(0)
    output = module(given).detach()
    gradients = [torch.randn(output.shape, generator=generator).to(output) for _ in range(NUM_PROBES)]
    weight = module._parameters["weight"]
    assert weight is not None
    changes = [torch.randn(weight.shape, generator=generator).to(weight.detach()) for _ in range(NUM_CHANGES)]
    return Call(module, (given,), {}, output, None, None), gradients, changes


@pytest.mark.parametrize(
    ("make", "shape", "num_samples"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding=1), (5, 3, 6, 6), 5),
        (lambda: nn.Conv2d(3, 4, 3, stride=2, dilation=2, bias=False), (5, 3, 9, 7), 5),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (4, 3, 6, 6), 4),
        (lambda: nn.Conv2d(3, 4, 1), (6, 3, 4, 4), 2),  # three entries per sample
        (lambda: nn.Conv1d(2, 3, 3), (4, 2, 9), 4),
        (lambda: nn.Conv3d(2, 3, 2), (4, 2, 3, 4, 5), 4),
    ],
    ids=["padding", "stride", "circular", "several-entries", "1d", "3d"],
)
@pytest.mark.parametrize("stacked", [1, 1 << 20], ids=["one-sample-at-a-time", "all-samples"])
@torch.no_grad()
def test_products_are_those_of_single_responses(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    num_samples: int,
    stacked: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, gradients, changes = called(make(), torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert convolved.fits(call, gradients, len(changes), Place(dim=0))
    expected = shares(call, gradients, [response(call, change) for change in changes], Place(dim=0), num_samples, [0])
    monkeypatch.setattr(convolved, "together_on", lambda device: stacked)
    actual = convolved.shares_of_changes(call, gradients, changes, num_samples)
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_half_precision_is_summed_in_float32() -> None:
    call, gradients, changes = called(nn.Conv2d(3, 4, 3).bfloat16(), torch.ones(2, 3, 5, 5).bfloat16())
    products = convolved.shares_of_changes(call, gradients, changes, 2)
    expected = shares(call, gradients, [response(call, change) for change in changes], Place(dim=0), 2, [0])
    assert products.dtype == torch.float32
    assert torch.allclose(products, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


class Doubled(nn.Conv2d):
    """A convolution that is not linear in its weight the way PyTorch's is."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


@torch.no_grad()
def test_other_calls_are_left_to_single_responses() -> None:
    given = torch.ones(2, 4, 5, 5)
    assert not convolved.fits(*called(nn.Conv2d(4, 4, 3, groups=2), given)[:2], 3, Place(dim=0))
    assert not convolved.fits(*called(Doubled(4, 4, 3), given)[:2], 3, Place(dim=0))
    assert not convolved.fits(*called(nn.Linear(5, 4), given)[:2], 3, Place(dim=0))
    plain = nn.Conv2d(4, 4, 3)
    call, gradients, _ = called(plain, given)
    assert not convolved.fits(call, gradients, 3, Place(owner=torch.zeros(2)))
    channels_last = [value.to(memory_format=torch.channels_last) for value in gradients]
    assert not convolved.fits(call, channels_last, 3, Place(dim=0))
    assert convolved.fits(call, gradients, 3, Place(dim=0))
    assert not convolved.fits(call, gradients, 1 << 20, Place(dim=0))
