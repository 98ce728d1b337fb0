"""Ranges of activations: the whole one, or less where that rounds better; nothing that a clamp cuts off."""

import math

import pytest
import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.measuring.inputs.ranges import activation_ranges
from qcompress.model.parts import survey
from qcompress.transforms.activations import Range
from qcompress.transforms.base import Ranges
from tests.measurements import Chain


def ranges_of(model: nn.Module, *data: Tensor) -> dict[str, Ranges]:
    model.eval()
    return activation_ranges(model, survey(model, data).parts, data, None)


def test_even_numbers_keep_their_whole_range() -> None:
    (found,) = ranges_of(Chain(nn.Linear(8, 8)), torch.linspace(-2, 3, 64).reshape(8, 8)).values()
    assert found[0] == pytest.approx((-2, 3))


def test_a_few_far_numbers_are_cut_off_as_far_as_that_rounds_better() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [2 * torch.rand(128, 64, generator=generator) - 1 for _ in range(8)]
    batches[0][0, 0] = 1.6
    ((low, high), _) = ranges_of(Chain(nn.Linear(64, 4)), *batches)["layers.0"]
    values = torch.cat(batches)
    error, whole = (float((Range(low, end).rounded(values) - values).square().sum()) for end in (high, 1.6))
    assert 1 < high < 1.6
    assert error < whole


@pytest.mark.parametrize(
    ("clamp", "ends"),
    [(nn.ReLU(), (0, math.inf)), (nn.ReLU6(), (0, 6)), (nn.Hardtanh(-0.5, 0.5), (-0.5, 0.5)), (nn.GELU(), None)],
)
def test_what_a_clamp_cuts_off_has_no_codes(clamp: nn.Module, ends: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(2, 4, 3)
    nn.init.normal_(layer.weight, std=5.0)
    model, batch = Chain(layer, clamp, nn.Conv1d(4, 2, 3)), torch.randn(4, 2, 9)
    low, high = ranges_of(model, batch)["layers.0"][1]
    out = layer(batch).detach()
    if ends is None:
        assert low < -1
    else:
        assert low == max(ends[0], float(out.min()))
        assert high <= min(ends[1], float(out.max())) * (1 + 1e-6)


def test_an_output_that_is_read_elsewhere_too_keeps_its_range() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return self.out(torch.relu(y)) + y

    torch.manual_seed(0)
    assert ranges_of(Both(), torch.randn(16, 8))["fc"][1][0] < 0


def test_a_layer_that_pads_its_input_itself_has_ranges_and_one_that_scales_it_has_none() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    torch.manual_seed(0)
    batch = torch.randn(2, 3, 5, 5)
    assert "layers.0" in ranges_of(Chain(Padded(3, 4, 2)), batch)
    assert ranges_of(Chain(Scaled(3, 4, 2)), batch) == {}


def test_activations_that_are_not_finite_are_named() -> None:
    layer = nn.Linear(4, 4)
    nn.init.ones_(layer.weight)
    with pytest.raises(DataError, match=r"activations of 'layers.0' are not finite"):
        ranges_of(Chain(layer, nn.Hardtanh()), torch.full((2, 4), torch.inf))
