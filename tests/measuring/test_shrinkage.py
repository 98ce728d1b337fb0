"""Second moments of few samples are shrunk, so that reconstruction holds for other samples."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import apply, fit_in_turn_, formulate, mean_loss, measure, prune_channels
from qcompress.compressed.reconstruction import FOLDS
from qcompress.errors import DataError
from qcompress.measuring import shrinkage
from qcompress.measuring.shrinkage import _damping, folds_of
from solvers import judge


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 8)).eval()


def inputs(samples: int, seed: int) -> Tensor:
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(seed))


def lost(samples: int, *, fitted: bool = False) -> float:
    """Loss on other samples of a network with half of its units, measured on some."""
    model, data = network(), [inputs(samples, 1)]
    measurement = measure(model, data, prune_channels(keep=(0.5,)), loss="mse")
    problem = formulate(measurement, {"bytes": 1.0})
    smaller = apply(model, measurement, judge(problem, [1]))
    if fitted:
        fit_in_turn_(smaller, model, data)
    return mean_loss(model, smaller, [inputs(2000, 2)], loss="mse")


@pytest.mark.parametrize("fitted", [False, True], ids=["option", "in turn"])
def test_a_fit_to_fewer_samples_than_inputs_holds_for_others(monkeypatch: pytest.MonkeyPatch, fitted: bool) -> None:
    chosen = lost(40, fitted=fitted)
    monkeypatch.setattr(shrinkage, "DAMPINGS", (0.01,))
    monkeypatch.setattr("qcompress.measuring.least_squares.DAMPINGS", (0.01,))
    assert chosen < lost(40, fitted=fitted)


def test_samples_that_do_not_reach_every_layer_leave_the_damping_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, moments = [], shrinkage.second_moments

    def reached(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise DataError("no calibration input")
        return moments(*given)

    monkeypatch.setattr(shrinkage, "second_moments", reached)
    chosen = lost(40)
    assert len(calls) == FOLDS
    monkeypatch.setattr(shrinkage, "DAMPINGS", (0.01,))
    assert chosen < lost(40)


class Vanishing(nn.Module):
    """Its second layer's inputs are zero, or differ from it by rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16)
        self.second, self.third, self.last = nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y = y * torch.sigmoid(self.third(self.second(y.mean((2, 3))).relu()))[:, :, None, None]
        out: Tensor = self.last(y.relu().mean((2, 3)))
        return out


class OfItsBatch(nn.Sequential):
    """Outputs depend on the other samples of a batch."""

    def __init__(self) -> None:
        norms = [nn.BatchNorm2d(8, track_running_stats=False) for _ in range(2)]
        convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        steps = [step for pair in zip(convolutions, norms, strict=True) for step in (*pair, nn.ReLU())]
        super().__init__(*steps, nn.Flatten(), nn.Linear(128, 4))


@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize(("kind", "size"), [(Vanishing, 9), (OfItsBatch, 8)])
def test_moments_of_the_other_samples_need_not_be_positive(kind: type[nn.Module], size: int) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, data = kind().eval(), [torch.randn(6, 3, size, size) for _ in range(2)]
    measurement = measure(model, data, prune_channels(keep=(0.5,)))
    assert len(measurement.sets) == 2
    assert np.isfinite(measurement.cost).all()


def test_nothing_is_added_to_the_moments_of_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = lost(4000)
    monkeypatch.setattr(shrinkage, "DAMPINGS", (0.01,))
    assert chosen == lost(4000)


@pytest.mark.parametrize(("errors", "chosen"), [
    ([[4.0, 2.0, 3.0, 9.0]] * 4, 0.1),  # in every fold the second is best
    ([[4.0, 2.0], [400.0, 210.0], [4.0, 2.0], [4.0, 2.1]], 0.1),  # folds count alike
    ([[4.0, 2.0], [4.0, 7.9], [4.0, 2.0], [4.0, 7.9]], 0.01),  # no better than chance
    ([[4.0, 5.0, 6.0, 7.0]] * 4, 0.01),
    ([[0.0, 0.0]] * 2, 0.01),
])  # fmt: skip
def test_a_larger_damping_must_be_clearly_better_in_most_folds(errors: list[list[float]], chosen: float) -> None:
    assert _damping(np.array(errors)) == chosen


@pytest.mark.parametrize(("data", "folds"), [
    ([1, 2, 3, 4, 5], [[1, 5], [2], [3], [4]]),
    ([{"a": torch.arange(3), "b": 7}], [[{"a": torch.tensor([k]), "b": 7}] for k in range(3)]),
    ([torch.arange(5), torch.arange(2)], [[torch.tensor([k, 4][: 2 - k]), torch.tensor([k])] for k in range(2)]),
    ([torch.zeros(1, 4)], []),
    ([{"a": torch.zeros(2), "b": torch.zeros(3)}], []),
])  # fmt: skip
def test_folds_of_the_data(data: list[Any], folds: list[list[Any]]) -> None:
    assert repr(list(folds_of(data))) == repr(folds)
