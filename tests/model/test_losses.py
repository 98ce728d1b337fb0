"""What a loss says of outputs: where its classes are is never guessed, and moving them changes nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import measure, prune_quantize
from qcompress.errors import ModelError, OptionsError
from qcompress.measuring.remeasure import remeasure
from qcompress.model.losses import KullbackLeibler, as_loss, is_named

FINE = prune_quantize(bits=(4, 8), sparsity=(0,))


class Segmentation(nn.Module):
    """``(N, 2, 4, 4)`` images to ``(N, classes, 4, 4)`` logits."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 2, 4, 4, generator=generator) for _ in range(2)]


def last(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch)
    return output.movedim(1, -1)


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_classes_in_dimension_one_are_those_of_outputs_that_have_them_last(method: str) -> None:
    model, data = Segmentation(), images()
    first = measure(model, data, FINE, loss="kl:1", method=method)
    moved = measure(model, data, FINE, loss="kl:-1", method=method, forward=last)
    # fisher draws the signs of its probes and sampled its labels for the classes last in both
    np.testing.assert_allclose(first.cost, moved.cost, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(first.factor @ first.factor.T, moved.factor @ moved.factor.T, rtol=1e-3, atol=1e-9)


def test_outputs_of_four_dimensions_are_refused_before_anything_is_worked_out() -> None:
    encoded: list[object] = []
    with pytest.raises(ModelError, match=r"\(4, 3, 4, 4\) it is unclear which dimension holds these: use loss='kl:1'"):
        measure(Segmentation(), images(), FINE, on_encode=encoded.append)
    assert not encoded


@pytest.mark.parametrize(
    ("dim", "shape", "match"),
    [
        (2, (5, 3), "'kl:2' compares distributions over dimension 2"),
        (-2, (5, 3), "'kl:-2' compares"),
        (1, (5, 1, 4), "which has one class there"),
        (None, (5, 1), "which has one class there"),
        (None, (5,), "over the last dimension"),
    ],
)
def test_a_dimension_without_classes_is_refused(dim: int | None, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        KullbackLeibler(dim).require(torch.zeros(shape))


def test_the_samples_are_no_classes() -> None:
    with pytest.raises(OptionsError, match="dimension 0 holds the samples"):
        as_loss("kl:0")


@pytest.mark.parametrize("dim", [1, 2, -1, -2])
def test_probes_and_effects_have_the_shape_of_outputs_and_the_hessian_of_the_moved_ones(dim: int) -> None:
    generator = torch.Generator().manual_seed(2)
    point = torch.randn(3, 4, 5, generator=generator)
    changes = torch.randn(6, 3, 4, 5, generator=generator)
    loss, plain = KullbackLeibler(dim), KullbackLeibler()
    moved = point.movedim(dim, -1)
    after = changes.movedim(dim + 1 if dim > 0 else dim, -1)
    assert loss.probes(point, None, generator).shape[1:] == point.shape
    assert loss.probe(point, None, generator).shape == point.shape
    found, expected = loss.effects(changes, point, None), plain.effects(after, moved, None)
    np.testing.assert_allclose(found.square().sum((1, 2, 3)), expected.square().sum((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(
        loss.rise(point + changes[0], point, None), plain.rise(moved + after[0], moved, None), rtol=1e-6
    )


def test_a_measurement_by_a_named_dimension_is_measured_again_by_it() -> None:
    model, data = Segmentation(), images()
    found = measure(model, data, FINE, loss="kl:1")
    assert found.loss == "kl:1"
    assert is_named(found.loss)
    choice = [1] * len(found.parts)
    assert remeasure(model, data, found, choice).loss == "kl:1"
