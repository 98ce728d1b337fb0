"""Measuring that stops before all batches are done, and what is known of predictions then."""

import re
from typing import Any

import numpy as np
import pytest
import torch

import qcompress
from qcompress.errors import OptionsError
from qcompress.formulation import prediction_error
from qcompress.measuring.effects import likely_choices
from tests.models import TiedLanguageModel, seeded

OPTIONS = qcompress.prune_quantize(bits=(3, 4, 6), sparsity=(0,))


def data(batches: int = 40, size: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(11, (size, 6), generator=generator) for _ in range(batches)]


def measured(**more: Any) -> qcompress.Measurement:
    return qcompress.measure(seeded(TiedLanguageModel), data(), OPTIONS, method="sampled", **more)


def test_it_stops_at_the_first_batch_with_that_precision() -> None:
    whole = measured()
    stopped = measured(precision=0.3)
    assert 8 <= stopped.num_samples < whole.num_samples
    assert stopped.notes == (
        f"{stopped.num_samples // 2} of 40 batches were measured: {stopped.notes[0].split(': ', 1)[1]}",
    )
    assert "asked for was 0.3" in stopped.notes[0]
    shorter = qcompress.measure(
        seeded(TiedLanguageModel), data()[: stopped.num_samples // 2], OPTIONS, method="sampled"
    )
    np.testing.assert_array_equal(stopped.cost, shorter.cost)


@pytest.mark.usefixtures("estimates_alone")
def test_a_precision_that_is_not_reached_is_noted_with_the_one_that_is() -> None:
    whole = measured(precision=1e-6)
    assert len(whole.notes) == 1
    found = re.fullmatch(
        r"the data ended at a relative standard error of ([\d.]+); precision asked for was 1e-06", whole.notes[0]
    )
    assert found is not None
    offsets = np.cumsum([0, *map(len, whole.transforms)])
    assert whole.standard_error is not None
    errors = []
    for chosen in likely_choices(whole.cost, whole.resources["bytes"], offsets):
        costs = 0.5 * np.square(whole.factor[chosen])
        spread = costs.sum(axis=0).var(ddof=1) * costs.shape[1]
        beyond = np.maximum(np.square(whole.standard_error[chosen]) - costs.var(axis=1, ddof=1) * costs.shape[1], 0)
        errors.append((spread + beyond.sum()) ** 0.5 / costs.sum())
    assert float(found[1]) == pytest.approx(max(errors), rel=1e-2)
    assert len(measured(precision=2 * float(found[1])).notes) == 1
    few = qcompress.measure(seeded(TiedLanguageModel), data(3), OPTIONS, method="sampled", precision=0.1)
    assert few.notes == (
        "the data ended after 6 samples, of the 8 that an estimate of the precision needs; precision asked for was 0.1",
    )
    assert measured(precision=0.1, time_limit=1e-9).notes == (
        "1 of 40 batches were measured: time_limit=1e-09 seconds",
        "measuring stopped after 2 samples, of the 8 that an estimate of the precision needs; "
        "precision asked for was 0.1",
    )


def test_channels_stop_after_some_time_and_say_so() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 8, generator=generator) for _ in range(5)]
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    stopped = qcompress.measure(model, batches, qcompress.prune_channels(keep=(0.5,)), time_limit=1e-9)
    assert stopped.num_samples == 4
    assert stopped.notes == ("1 of 5 batches were measured: time_limit=1e-09 seconds",)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2])
def test_it_stops_at_the_same_batch_with_any_number_of_processes(jobs: int) -> None:
    assert measured(precision=0.3, jobs=jobs).num_samples == measured(precision=0.3).num_samples


def test_it_stops_after_some_time() -> None:
    stopped = measured(time_limit=1e-9)
    assert stopped.num_samples == 2
    assert stopped.notes == ("1 of 40 batches were measured: time_limit=1e-09 seconds",)
    direct = qcompress.measure(seeded(TiedLanguageModel), data(), OPTIONS, method="direct", time_limit=1e-9)
    assert direct.num_samples == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "fisher", "precision": 0.1}, "precision= needs method='sampled'"),
        ({"precision": 0}, "precision must be a number above 0, found 0"),
        ({"time_limit": -1.0}, r"time_limit must be a number above 0, found -1\.0"),
    ],
)
def test_what_makes_no_sense_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        qcompress.measure(seeded(TiedLanguageModel), data(), OPTIONS, **{"method": "sampled", **more})


@pytest.mark.usefixtures("estimates_alone")
def test_the_standard_error_of_a_prediction_is_its_spread_over_measurements() -> None:
    model, choice, strengths = seeded(TiedLanguageModel), np.array([2, 1]), (False, True, 1.0)
    objectives: dict[float, list[float]] = {pairs: [] for pairs in strengths}
    errors: dict[float, list[float]] = {pairs: [] for pairs in strengths}
    for seed in range(40):
        measurement = qcompress.measure(model, [data(1, 16)[0]], OPTIONS, method="sampled", seed=seed)
        for pairs in strengths:
            problem = qcompress.formulate(measurement, {"bytes": 1.0}, pairs=pairs)
            error = prediction_error(measurement, problem, choice)
            assert error is not None
            objectives[pairs].append(problem.evaluate(choice).objective)
            errors[pairs].append(error)
    for pairs in strengths:
        # a standard deviation from 40 draws is known to 1 / sqrt(80), 11 %; three of them
        assert np.mean(errors[pairs]) == pytest.approx(np.std(objectives[pairs], ddof=1), rel=0.35)


def test_the_error_of_a_prediction_is_never_below_that_of_its_single_cost() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    inputs = torch.randn(40, 6)
    inputs[7] *= 8  # its effects stand out and are limited
    measurement = qcompress.measure(model, [inputs], OPTIONS, method="sampled", loss="mse")
    assert measurement.standard_error is not None
    problem = qcompress.formulate(measurement, {"bytes": 1.0}, pairs=False)
    costs = 0.5 * np.square(measurement.factor)
    beyond = measurement.standard_error > 1.5 * costs.std(axis=1, ddof=1) * costs.shape[1] ** 0.5
    assert beyond.any()  # the spread of what is left does not tell
    offsets = np.cumsum([0, *map(len, measurement.transforms)])
    for part, first in enumerate(offsets[:-1]):
        for option in range(1, len(measurement.transforms[part])):
            choice = np.zeros(len(measurement.transforms), dtype=int)
            choice[part] = option
            error = prediction_error(measurement, problem, choice)
            assert error is not None
            assert error >= measurement.standard_error[first + option] * (1 - 1e-9)


def test_beyond_the_columns_that_are_kept_errors_go_on_falling() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    batches = list(torch.randn(2048, 6).split(128))
    stopped = qcompress.measure(model, batches, OPTIONS, method="sampled", precision=0.05)
    assert 512 < stopped.num_samples < 2048  # squares of normal effects need 2 / 0.05² = 800
    assert "asked for was 0.05" in stopped.notes[0]


def test_errors_of_parts_evaluated_one_by_one_do_not_depend_on_the_batches() -> None:
    class Rounding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(torch.round(4 * self.embed(ids)) / 4).mean(1)
            return out

    model, ids = seeded(Rounding), torch.cat(data(24, 2))
    measured = [qcompress.measure(model, list(ids.split(size)), OPTIONS, method="sampled") for size in (48, 8, 1)]
    assert set(measured[0].tried) == {"embed"}
    for other in measured:
        assert other.standard_error is not None
        assert measured[0].standard_error is not None
        errors = other.standard_error[1:3]  # those of "embed"
        assert errors.min() > 0
        np.testing.assert_allclose(errors, measured[0].standard_error[1:3], rtol=1e-6)  # sums of float64


def test_the_report_has_the_errors() -> None:
    result = qcompress.compress(
        seeded(TiedLanguageModel), data(4, 4), budget={"bytes": 0.35}, options=OPTIONS, method="sampled",
        guard=False, solver="dp", pairs=False,
    )  # fmt: skip
    report = result.report
    assert report.loss_predicted_error is not None
    assert 0 < report.loss_predicted_error < report.loss_predicted
    assert f"of nothing else: {report.loss_predicted_error:.2g})" in report.to_markdown()
    assert all(part.loss_alone_error is not None for part in report.parts)
    assert " ± " in report.to_markdown()
    linear = qcompress.measure(seeded(TiedLanguageModel), data(2), OPTIONS)
    assert prediction_error(linear, qcompress.formulate(linear, {"bytes": 0.5}), np.zeros(2, dtype=int)) is None
