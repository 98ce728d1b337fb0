"""What a loss says of outputs: where its classes are is never guessed, and moving them changes nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import measure, prune_quantize
from qcompress.errors import ModelError, OptionsError
from qcompress.model.losses import KullbackLeibler, as_loss, is_named
from qcompress.streaming.remeasuring import remeasure

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
        KullbackLeibler(dim).require(torch.zeros(shape), None)


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


class Sequence(nn.Module):
    """``(N, 2, 8)`` sequences to ``(N, classes, 8)``, or words to ``(N, words, classes)``, in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.embed = way, nn.Embedding(5, 6)
        self.one, self.two, self.turned = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 5, 1), nn.Linear(6, 5)
        self.places = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            inner = torch.tanh(self.embed(x))
            if self.way == "tied":
                return inner @ self.embed.weight.T
            inner = self.turned(inner + self.places[: x.shape[1]])
            return 30 * torch.tanh(inner / 30) if self.way == "capped" else inner
        inner = torch.relu(self.one(x))
        if self.way == "functional":
            return torch.nn.functional.conv1d(inner, self.two.weight, self.two.bias)
        if self.way == "turned":
            return self.turned(inner.mT).mT
        return self.two(inner).log_softmax(1) if self.way == "logarithms" else self.two(inner)


def sequences() -> list[Tensor]:
    return [torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(1))]


def sentences() -> list[Tensor]:
    return [torch.randint(5, (4, 7), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("way", ["convolution", "functional", "turned", "logarithms"])
@pytest.mark.parametrize("method", ["fisher", "sampled"])
def test_classes_that_are_seen_to_be_in_dimension_one_are_not_taken_for_positions(way: str, method: str) -> None:
    with pytest.raises(ModelError, match=r"\(4, 5, 8\) the second one seems to hold them, .* give loss='kl:1'"):
        measure(Sequence(way), sequences(), FINE, method=method)
    assert measure(Sequence(way), sequences(), FINE, method=method, loss="kl:1").loss == "kl:1"


@pytest.mark.parametrize("way", ["tied", "head", "capped"])
def test_language_models_need_no_word_on_their_classes(way: str) -> None:
    model, flags = Sequence(way), [own.requires_grad for own in Sequence(way).parameters()]
    assert measure(model, sentences(), FINE).loss == "kl"
    assert [own.requires_grad for own in model.parameters()] == flags


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, batch: model(batch).sort(1).values.sort(2).values,  # every number may come from any weight
        lambda model, batch: model(batch).detach(),
    ],
)
def test_outputs_of_which_nothing_tells_where_the_classes_are_are_refused(forward: object) -> None:
    with pytest.raises(ModelError, match=r"neither outputs of shape \(4, 5, 8\) nor the network tell"):
        measure(Sequence("convolution"), sequences(), FINE, forward=forward)  # type: ignore[arg-type]


def test_logarithms_of_probabilities_tell_where_the_classes_are_without_gradients() -> None:
    found = measure(
        Sequence("head"), sentences(), FINE, forward=lambda model, batch: model(batch).log_softmax(-1).detach(),
        method="direct",
    )  # fmt: skip
    assert found.loss == "kl"
