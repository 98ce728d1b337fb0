"""Removal of channels in rounds: within the budgets, never worse than all at once, resumable."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress import compress, mean_loss, measure, prune_channels, prune_quantize
from qcompress.compressed.cutting import beyond, cut_, together
from qcompress.errors import OptionsError
from qcompress.model.counting import count
from qcompress.model.tensors import total_bytes
from qcompress.report import Report
from qcompress.steps.rounds import START
from solvers import judge

CHANNELS = prune_channels(keep=(0.75, 0.5))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(48, 4),
        ).eval()  # fmt: skip


def images(samples: int = 48) -> list[Tensor]:
    return list(torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(0)).split(12))


def in_rounds(**given: Any) -> qcompress.Result:
    return compress(network(), images(), options=CHANNELS, time_limit=2, **{"budget": {"macs": "40%"}, **given})


def test_rounds_approach_the_budget_in_equal_ratios_and_are_never_worse_than_one() -> None:
    result = in_rounds(rounds=3)
    report = result.report
    assert [entry.name for entry in report.rounds] == [START, "round 1", "round 2", "round 3"]
    whole = report.original["macs"]
    for entry, share in zip(report.rounds[1:], (0.4 ** (1 / 3), 0.4 ** (2 / 3), 0.4), strict=True):
        assert entry.usage["macs"] <= share * whole + 1e-6
    assert report.loss_validation == min(report.rounds[0].loss_validation, report.rounds[-1].loss_validation)
    assert count(result.model, images(), None).macs == pytest.approx(report.usage["macs"], rel=1e-9)
    assert report.original["macs"] == count(network(), images(), None).macs
    assert "round 2: loss" in report.to_markdown()


def test_losses_of_a_smaller_network_are_relative_to_the_original() -> None:
    model, data = network(), images()
    smaller = in_rounds().model
    measurement = measure(smaller, data, CHANNELS, original=model)
    assert measurement.standing_loss == pytest.approx(mean_loss(model, smaller, data), rel=1e-6)
    problem = qcompress.formulate(measurement, {"macs": 1.0})
    choice = [1] + [0] * (problem.num_groups - 1)
    cut = qcompress.apply(smaller, measurement, judge(problem, np.array(choice)))
    assert mean_loss(model, cut, data) == pytest.approx(problem.evaluate(choice).objective, rel=1e-3)


def test_codes_are_chosen_in_the_last_round(tmp_path: Path) -> None:
    options = CHANNELS + prune_quantize(bits=(4, 8), sparsity=(0,), compensated=True)
    given = {"budget": {"macs": 0.6, "bytes": 0.2}, "options": options, "rounds": 2, "time_limit": 2}
    result = compress(network(), images(), folder=tmp_path, **given)  # type: ignore[arg-type]
    for entry in (result.report.rounds[0], result.report.rounds[-1]):
        assert entry.usage["bytes"] <= 0.2 * result.report.original["bytes"]
    assert qcompress.compressed_size(result.model).payload_bytes <= 0.2 * result.report.original["bytes"]
    again = compress(network(), images(), folder=tmp_path, **given)  # type: ignore[arg-type]
    for made in (result, again):
        made.report.wall_s.pop("check")
    assert again.report.to_json() == result.report.to_json()  # times included: nothing was made again
    loaded = qcompress.load_compressed(tmp_path / "model.safetensors", network)
    with torch.no_grad():
        assert torch.equal(loaded(images()[0]), result.model(images()[0]))
    assert Report.load(tmp_path / "report.json").rounds == result.report.rounds


def test_what_a_round_says_of_the_original_is_not_of_the_network_it_starts_from(tmp_path: Path) -> None:
    codes = CHANNELS + prune_quantize(bits=(4, 8), sparsity=(0,))
    whole = float(total_bytes(network()))
    loose = f"the budget for bytes is {2 * whole:,.0f}, which the original meets already with {whole:,.0f}"
    for budget, options, said in (
        ({"macs": 0.6, "bytes": 0.3}, codes, set()),
        ({"macs": 0.5, "bytes": 2 * whole}, CHANNELS, {loose}),
    ):
        folder = tmp_path / str(len(said))
        result = compress(network(), images(), budget=budget, options=options, rounds=2, time_limit=2, folder=folder)
        for report in (result.report, *(Report.load(folder / f"round_{number}/report.json") for number in (1, 2))):
            assert report.original["bytes"] == whole
            met = [warning for warning in report.warnings if "meets already" in warning]
            assert all(said and warning.endswith(f"meets already with {whole:,.0f}") for warning in met)
        assert said <= set(result.report.warnings)
        of_last = result.report.loss_predicted == result.report.rounds[-1].loss_predicted
        assert ("that round 2 started from" in result.report.to_markdown()) == of_last


def test_a_run_that_was_cut_goes_on_after_its_last_round(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(progress: Any) -> None:
        if (tmp_path / "round_1" / "report.json").exists():
            raise StopError

    with pytest.raises(StopError):
        in_rounds(rounds=2, folder=tmp_path, on_measure=stop)
    measured = []
    resumed = in_rounds(rounds=2, folder=tmp_path, on_measure=measured.append)
    assert len(measured) <= len(images())  # of the last round only
    assert resumed.report.rounds == in_rounds(rounds=2).report.rounds


def test_a_folder_serves_a_network_that_was_smaller_before(tmp_path: Path) -> None:
    smaller = in_rounds().model
    first, again = (compress(smaller, images(), budget={"macs": 0.7}, options=CHANNELS, time_limit=2, folder=tmp_path)
                    for _ in range(2))  # fmt: skip
    with torch.no_grad():
        assert torch.equal(first.model(images()[0]), again.model(images()[0]))


def test_where_a_round_finds_nothing_to_remove_all_at_once_is_returned_and_said() -> None:
    model, data = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), [torch.randn(32, 4)]
    result = compress(model, data, budget={"macs": "50%"}, options=prune_channels(keep=(0.5,)), rounds=2, time_limit=2)
    assert result.report.usage["macs"] == 7
    assert [entry.name for entry in result.report.rounds] == [START, "round 1"]
    assert any("round 2 was not possible" in warning for warning in result.report.warnings)


def test_cuts_beyond_earlier_ones_are_what_was_cut_then() -> None:
    layer = nn.Linear(6, 9)
    first, second = {("weight", 0): [1, 4], ("weight", 1): [5]}, {("weight", 0): [0, 6], ("weight", 1): [2]}
    cut_(layer, first)
    before = copy.deepcopy(layer)
    cut_(layer, second)
    assert beyond(together(first, second, layer), first, before) == second


def test_what_does_not_go_with_rounds_is_refused_before_anything_runs() -> None:
    with pytest.raises(OptionsError, match="rounds= is for channels"):
        compress(network(), images(), budget={"bytes": 0.5}, rounds=2)
    with pytest.raises(OptionsError, match="give options=, not measurement="):
        compress(
            network(), images(), budget={"macs": 0.5}, measurement=measure(network(), images(), CHANNELS), rounds=2
        )
    with pytest.raises(OptionsError, match="rounds must be"):
        in_rounds(rounds=0)
    with pytest.raises(OptionsError, match="original= is for channels"):
        measure(network(), images(), prune_quantize(), original=network())
