"""Channels as options: which go first, what stays making up for it, and the whole way from measuring to a file."""

import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from formulations import Problem
from qcompress import (
    Options,
    compress,
    fit_in_turn_,
    formulate,
    integer_products,
    mean_loss,
    measure,
    prune_channels,
    prune_quantize,
    solve,
)
from qcompress.compressed.channels import put_channels_
from qcompress.compressed.reconstruction import DAMPING, reconstruct
from qcompress.errors import ArtefactError, ModelError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring import channels
from qcompress.model.counting import count
from qcompress.model.losses import as_loss
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.scores import by_weight, elimination_order, sensitivity
from qcompress.structure.uses import Uses, uses_of
from solvers import Solution, judge
from tests.quick import slow_but
from tests.structure.random_channels import random_network

KEEP = (0.75, 0.5, 0.25)


def seeded(make: "type[nn.Module] | object", seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return make().eval()  # type: ignore[operator]


def two_layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    )


def images(seed: int = 0, samples: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(samples, 3, 6, 6, generator=generator).split(8))


def moments_of(measurement: Measurement) -> dict[str, Tensor]:
    return {path: torch.tensor(values) for path, values in measurement.moments.items()}


@pytest.mark.parametrize("channels", [1, 4])
def test_reconstruction_is_the_least_squares_answer(channels: int) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7))
    rows, gone, stay = rng.normal(size=(channels, 7)), [1, 5], [0, 2, 3, 4, 6]
    moments = inputs.T @ inputs / len(inputs)
    weight = np.sqrt(len(inputs) * DAMPING * np.trace(moments) / 7)
    padded = np.concatenate([inputs, weight * np.eye(7)])  # the damping as more samples
    expected = np.linalg.lstsq(padded[:, stay], padded @ rows.T, rcond=None)[0].T
    found = reconstruct(torch.tensor(rows), torch.tensor(moments), torch.tensor(gone)).numpy()
    np.testing.assert_allclose(found[:, stay], expected, rtol=1e-6)
    assert (found[:, gone] == 0).all()


def test_elimination_costs_are_those_of_the_reconstruction() -> None:
    model, data = seeded(two_layers), images()
    measurement = measure(model, data, prune_channels(keep=KEEP), loss="mse")
    item = measurement.sets[0]
    moments = moments_of(measurement)
    plain = {"2": np.ones(6), "5": np.ones(4)}
    order = elimination_order(model, item, moments, plain)
    assert order is not None
    assert sorted(order) == sorted(set(order))
    module = model[2]
    rows, whole = module.weight.detach().flatten(1).double(), moments["2"].double()
    whole = whole + DAMPING * whole.diagonal().mean() * torch.eye(len(whole))

    def lost(units: list[int]) -> float:
        columns = torch.cat([torch.arange(9 * unit, 9 * unit + 9) for unit in units])
        change = rows - reconstruct(rows, moments["2"], columns)
        return float(((change @ whole) * change).sum())

    for step in range(len(order)):
        alone = {unit: lost([*order[:step], unit]) for unit in range(8) if unit not in order[:step]}
        assert alone[order[step]] == pytest.approx(min(alone.values()), rel=1e-6)


def test_scores_do_not_change_when_a_layer_is_scaled_and_the_next_scaled_back() -> None:
    model, data = seeded(two_layers), images()
    scaled = copy.deepcopy(model)
    factors = torch.tensor([0.01, 0.1, 0.5, 1.0, 2.0, 7.0, 30.0, 100.0])
    with torch.no_grad():
        scaled[0].weight.mul_(factors[:, None, None, None])
        scaled[0].bias.mul_(factors)
        scaled[2].weight.div_(factors[None, :, None, None])
    sets = find_sets(model, data).sets
    first, other = (sensitivity(own, data, sets, as_loss("kl"), None, 0) for own in (model, scaled))
    for name in first.fisher:
        np.testing.assert_allclose(first.fisher[name], other.fisher[name], rtol=1e-3)
    assert not np.allclose(by_weight(model, sets[0]), by_weight(scaled, sets[0]), rtol=0.1)


def test_obs_does_not_change_when_a_whole_layer_is_scaled_and_the_next_scaled_back() -> None:
    model, data, felt = seeded(two_layers), images(), {"2": np.ones(6)}
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled[0].parameters():
            parameter.mul_(100.0)
        scaled[2].weight.div_(100.0)
    first, other = (measure(own, data, prune_channels(keep=KEEP), loss="mse") for own in (model, scaled))
    orders = [elimination_order(own, measurement.sets[0], moments_of(measurement), felt)
              for own, measurement in ((model, first), (scaled, other))]  # fmt: skip
    assert orders[0] == orders[1]
    np.testing.assert_allclose(first.cost, other.cost, rtol=1e-3, atol=1e-9)


def test_the_second_of_two_equal_channels_is_dear_by_obs_only() -> None:
    model, data = seeded(two_layers), images(samples=160)  # of a few, equal channels would be damped apart
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0], model[0].bias[0]
        model[2].weight[:, :2] *= 3.0
    measurement = measure(model, data, prune_channels(keep=(0.5,)))
    sets = measurement.sets
    felt = sensitivity(model, data, sets, as_loss("kl"), None, 0)
    order = elimination_order(model, sets[0], moments_of(measurement), felt.outputs)
    assert order is not None
    first, second = sorted([0, 1], key=[*order, *({*range(8)} - {*order})].index)
    assert first in order[:3]
    assert second not in order[:5]
    assert not {0, 1} & set(np.argsort(felt.fisher["0"])[:5].tolist())


@pytest.mark.parametrize("reconstructed", [True, False])
def test_a_measured_cost_is_the_loss_of_the_network_that_is_cut(reconstructed: bool) -> None:
    model, data = random_network(6), [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    measurement = measure(model, data, prune_channels(keep=KEEP, reconstructed=reconstructed), loss="mse")
    problem = formulate(measurement, {"bytes": 1.0, "macs": 1.0})
    assert problem.evaluate([0] * problem.num_groups).usage == pytest.approx(dict(measurement.original))
    for group, options in enumerate(measurement.labels):
        for option in range(len(options)):
            choice = [0] * problem.num_groups
            choice[group] = option
            judged = problem.evaluate(choice)
            smaller = qcompress.apply(model, measurement, solve_at(problem, choice))
            assert mean_loss(model, smaller, data, loss="mse") == pytest.approx(judged.objective, rel=1e-3, abs=1e-9)
            assert total_bytes(smaller) == judged.usage["bytes"]
            assert count(smaller, data, None).macs == pytest.approx(judged.usage["macs"], rel=1e-9)


def test_what_makes_up_for_units_is_computed_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    puts = []

    def put(*given: Any) -> Any:
        puts.append(given)
        return put_channels_(*given)

    monkeypatch.setattr("qcompress.measuring.channels.put_channels_", put)
    once = measure(seeded(two_layers), images(), prune_channels(keep=KEEP))
    assert len(puts) == sum(len(options) - 1 for options in once.labels)
    monkeypatch.setattr("qcompress.measuring.channels.room_on", lambda device: 0)
    puts.clear()
    assert np.array_equal(measure(seeded(two_layers), images(), prune_channels(keep=KEEP)).cost, once.cost)
    assert len(puts) == 3 * sum(len(options) - 1 for options in once.labels)


def solve_at(problem: Problem, choice: list[int]) -> Solution:

    return judge(problem.with_budgets(bytes=1e12, macs=1e12), choice)


def test_making_up_for_what_goes_loses_less_on_the_calibration_data() -> None:
    model, data = seeded(two_layers), images()
    with_it, without = (
        measure(model, data, prune_channels(keep=KEEP, scores="l1", reconstructed=own), loss="mse")
        for own in (True, False)
    )
    assert with_it.cost.sum() < 0.8 * without.cost.sum()


def test_fitting_in_turn_loses_less_than_options_made_up_for_alone() -> None:
    model, data, others = seeded(two_layers), images(samples=384), images(1, samples=384)
    measurement = measure(model, data, prune_channels(keep=KEEP), loss="mse")
    smaller = qcompress.apply(model, measurement, solve(formulate(measurement, {"macs": 0.4}), "brute-force"))
    before = [mean_loss(model, smaller, batches, loss="mse") for batches in (data, others)]
    shapes = [tensor.shape for tensor in smaller.parameters()]
    fit_in_turn_(smaller, model, data)
    after = [mean_loss(model, smaller, batches, loss="mse") for batches in (data, others)]
    assert after[0] < 0.95 * before[0]
    assert after[1] < 0.99 * before[1]
    assert [tensor.shape for tensor in smaller.parameters()] == shapes
    with pytest.raises(ModelError, match="no record of removed channels"):
        fit_in_turn_(model, model, data)


def test_a_file_holds_the_smaller_network_and_measurements_round_trip(tmp_path: Path) -> None:
    model, data = seeded(two_layers), images()
    measurement = measure(model, data, prune_channels(keep=KEEP))
    measurement.save(tmp_path / "measurement.npz")
    again = Measurement.load(tmp_path / "measurement.npz")
    problem = formulate(again, {"macs": 0.5})
    assert problem.fingerprint() == formulate(measurement, {"macs": 0.5}).fingerprint()
    solution = solve(problem, "brute-force")
    smaller = qcompress.apply(model, again, solution)
    saved = qcompress.save_compressed(smaller, tmp_path / "small.st")
    assert saved.payload_bytes == solution.usage["bytes"] == total_bytes(smaller)
    loaded = qcompress.load_compressed(saved.path, lambda: seeded(two_layers, seed=5))
    assert torch.equal(loaded(data[0]), smaller(data[0]))
    assert qcompress.save_compressed(loaded, tmp_path / "again.st").file_bytes == saved.file_bytes
    with pytest.raises(ArtefactError, match="the file was cut from"):
        qcompress.load_compressed(
            saved.path, lambda: nn.Sequential(nn.Conv2d(3, 9, 3, padding=1), *list(seeded(two_layers))[1:])
        )


def test_compress_gives_a_smaller_dense_network_within_the_budget(tmp_path: Path) -> None:
    model, data = seeded(two_layers), images()
    result = compress(
        model, data, budget={"macs": "50%"}, options=prune_channels(keep=KEEP), folder=tmp_path, time_limit=5
    )
    assert count(result.model, data, None).macs == pytest.approx(result.report.usage["macs"])
    assert result.report.usage["macs"] <= result.report.budgets["macs"]
    assert sum(part.bytes_after for part in result.report.parts) < sum(
        part.bytes_before for part in result.report.parts
    )
    assert "of 8 channels" in result.report.to_markdown()
    again = compress(
        model, data, budget={"macs": "50%"}, options=prune_channels(keep=KEEP), folder=tmp_path, time_limit=5
    )
    assert torch.equal(again.model(data[0]), result.model(data[0]))


@pytest.mark.parametrize("further", [{}, {"rounds": 2}, {"finetune_steps": 1}])
@pytest.mark.parametrize("codes", slow_but([True], [False, True]))
@pytest.mark.parametrize("resource", ["macs", "bytes"])
def test_a_budget_that_the_original_meets_leaves_it_as_it_is(
    resource: str, codes: bool, further: dict[str, Any]
) -> None:
    model, data = seeded(two_layers), images()
    options = prune_channels(keep=(0.5,)) + (prune_quantize(bits=(8,), sparsity=(0,)) if codes else Options(()))
    report = compress(model, data, budget={resource: "100%"}, options=options, time_limit=2, **further).report
    assert report.usage == report.original
    assert {part.option for part in report.parts} == {"keep"}
    assert any("meets already" in warning for warning in report.warnings)


@pytest.mark.parametrize("missed", ["macs", "bytes", ""])
def test_the_report_states_what_the_smaller_network_takes(missed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any, **named: Any) -> Uses:
        uses = uses_of(*given, **named)
        fixed = {name: use + 100 * (name == missed) for name, use in uses.fixed.items()}
        return replace(uses, fixed=MappingProxyType(fixed))

    monkeypatch.setattr(channels, "uses_of", wrong)
    model, data = seeded(two_layers), images()
    options = prune_channels(keep=KEEP)
    result = compress(model, data, budget={"macs": "50%"}, options=options, guard=False, time_limit=2)
    assert result.report.usage["macs"] == pytest.approx(count(result.model, data, None).macs, rel=1e-9)
    assert result.report.usage["bytes"] == total_bytes(result.model)
    said = [warning for warning in result.report.warnings if "smaller network takes" in warning]
    assert [missed in warning for warning in said] == ([True] if missed else [])


def test_samples_of_different_length_are_no_difference() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))

    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, size, size, generator=generator) for size in (6, 9, 5, 7)]
    options = prune_channels(keep=(0.5,))
    result = compress(seeded(Pooled), data, budget={"macs": "60%"}, options=options, guard=False, time_limit=2)
    assert result.report.usage["macs"] == pytest.approx(count(result.model, data, None).macs, rel=1e-9)
    assert not any("smaller network takes" in warning for warning in result.report.warnings)


def test_a_smaller_network_can_be_compressed_further(tmp_path: Path) -> None:
    model, data = seeded(two_layers), images()
    smaller = compress(model, data, budget={"macs": 0.6}, options=prune_channels(keep=KEEP), time_limit=5).model
    result = compress(smaller, data, budget={"bytes": 0.4}, options=prune_quantize(bits=(4, 8)), time_limit=5)
    assert result.model[0].out_channels < 8
    again = compress(smaller, data, budget={"macs": 0.7}, options=prune_channels(keep=KEEP), time_limit=5).model
    assert again[0].out_channels + again[2].out_channels < smaller[0].out_channels + smaller[2].out_channels
    for number, own in enumerate((result.model, again)):  # into the architecture before anything was cut
        saved = qcompress.save_compressed(own, tmp_path / f"{number}.st")
        loaded = qcompress.load_compressed(saved.path, lambda: seeded(two_layers, seed=3))
        assert torch.equal(loaded(data[0]), own(data[0]))


def test_granularity_keeps_multiples() -> None:
    measurement = measure(seeded(two_layers), images(), prune_channels(keep=KEEP, granularity=4))
    assert measurement.labels[0] == ("keep", "4 of 8 channels")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": ()}, "keep is empty"),
        ({"keep": (1.0,)}, "from 0 and below 1, found 1.0"),
        ({"granularity": 0}, "of at least 1, found 0"),
        ({"scores": "size"}, "one of obs, fisher, l1, found 'size'"),
        ({"reconstructed": 1}, "True or False, found 1"),
    ],
)
def test_wrong_options_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(OptionsError, match=said):
        prune_channels(**wrong)  # type: ignore[arg-type]


def test_what_does_not_go_with_channels_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = seeded(two_layers), images()
    with pytest.raises(OptionsError, match="channel removal can be combined with prune_quantize"):
        measure(model, data, prune_channels() + integer_products())
    with pytest.raises(OptionsError, match="method='sampled' has no gradient"):
        measure(model, data, prune_channels(), method="sampled")
    with pytest.raises(OptionsError, match=r"lies along the channels of both .* use a budget for macs"):
        compress(model, data, budget={"latency_s": 0.5}, options=prune_channels())
    with pytest.raises(OptionsError, match="refine_rounds= is not supported for channels"):
        compress(model, data, budget={"macs": 0.5}, options=prune_channels(), refine_rounds=1)
    monkeypatch.setattr(type(model), "forward", None)  # no pass is needed for this
    for target in ("onnxruntime", "llama.cpp"):
        with pytest.raises(OptionsError, match=r"target= is not supported for channels.* export\(\) writes it"):
            compress(model, data, budget={"macs": 0.5}, options=prune_channels(), target=target)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no channel of the model can be removed"):
        measure(nn.Sequential(nn.Linear(4, 3)), [torch.randn(2, 4)], prune_channels())
