"""Latency as a resource: with a clock that counts work, the prediction is exactly the work of the compressed model."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompress import (
    Measurement,
    compress,
    formulate,
    low_rank,
    measure,
    prune_channels,
    prune_quantize,
    split_vocabulary_,
    time_options,
)
from qcompress import apply as compressed
from qcompress.compressed.factored import Factored
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring import latency, stopwatch
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.vocabulary import vocabulary_blocks
from tests.measurements import KINDS, Chain, measured, option_like, solution
from tests.models import Reused

OPTIONS = low_rank(
    ratios=(0.3, 0.6), kinds=("channels", "spatial", "tucker", "sliced"), slices=(2,), whitened=False
) + low_rank(ratios=(0.6,), whitened=False).then(prune_quantize(bits=(4,), sparsity=(0,)))


class Work(TorchDispatchMode):
    """Counts the numbers that go into every operation and come out of it: a clock that shows no chance."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.done += 1 + sum(own.numel() for own in tree_leaves((args, result)) if isinstance(own, Tensor))
        return result


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    counter = Work()
    monkeypatch.setattr(stopwatch, "clock_of", lambda _: lambda: counter.done)
    with counter:
        yield counter


def work_of(model: nn.Module, batch: Tensor, work: Work) -> float:
    begun = work.done
    with torch.no_grad():
        model.eval()(batch)
    return work.done - begun


@pytest.mark.parametrize("kind", KINDS)
def test_any_choice_takes_what_the_compressed_model_takes(kind: str, work: Work) -> None:
    make, batch = KINDS[kind][0], KINDS[kind][1]()
    model = make().eval()
    told: list[TimingProgress] = []
    measurement = time_options(model, measured(model, batch, OPTIONS), batch, repeats=2, on_progress=told.append)
    done = [progress.layers for progress in told]
    assert (done[0], done) == (0, sorted(set(done)))
    assert done[-1] == told[-1].total_layers == len(measurement.parts)
    assert measurement.original["latency_s"] == work_of(model, batch, work)
    problem = formulate(measurement, {"latency_s": 1.0})
    choices = np.random.default_rng(0)
    for _ in range(8):
        choice = [choices.integers(len(options)) for options in problem.options]
        smaller = compressed(model, measurement, solution(choice))
        assert problem.evaluate(choice).usage["latency_s"] == pytest.approx(work_of(smaller, batch, work), rel=1e-12)


def test_blocks_of_channels_share_their_layers_time(work: Work) -> None:
    model, batch = KINDS["mixed"][0]().eval(), KINDS["mixed"][1]()
    whole = time_options(model, measured(model, batch, OPTIONS), batch, repeats=1)
    blocks = time_options(model, measured(model, batch, OPTIONS + prune_quantize(), granularity=3), batch, repeats=1)
    assert blocks.fixed["latency_s"] == whole.fixed["latency_s"]
    use = dict(zip((part.name for part in blocks.parts), _uses(blocks), strict=True))
    dense = {part.name: own[0] for part, own in zip(whole.parts, _uses(whole), strict=True)}
    for name, share in (("stem[0:3]", 3 / 8), ("stem[6:8]", 2 / 8)):
        assert use[name] == pytest.approx([dense["stem"] * share] * len(use[name]))
        assert len(use[name]) > 1


def test_a_vocabulary_in_blocks_is_timed_block_by_block(work: Work) -> None:
    torch.manual_seed(0)
    model, batch = Chain(nn.Embedding(30, 8), nn.Linear(8, 3)).eval(), torch.randint(30, (4, 5))
    split_vocabulary_(model, "layers.0", vocabulary_blocks(range(30), sizes=(10, 20)))
    measurement = time_options(model, measured(model, batch, low_rank(ratios=(0.6,), whitened=False)), batch, repeats=1)
    choice = option_like(measurement, "low_rank")
    smaller = compressed(model, measurement, solution(choice))
    assert sum(isinstance(own, Factored) for own in smaller.modules()) >= 2
    usage = formulate(measurement, {"latency_s": 1.0}).evaluate(choice).usage["latency_s"]
    assert usage == pytest.approx(work_of(smaller, batch, work), rel=1e-12)


def test_what_a_layer_takes_by_name_is_timed(work: Work) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    model, batch = Named().eval(), torch.randn(4, 8)
    measurement = time_options(model, measured(model, batch, low_rank(ranks=(2,), whitened=False)), batch, repeats=1)
    dense, factors = measurement.resources["latency_s"]
    smaller = compressed(model, measurement, solution([1]))
    assert factors - dense == work_of(smaller, batch, work) - work_of(model, batch, work)


def test_a_layer_that_the_batch_does_not_reach_takes_no_time(work: Work) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) if len(x) > 2 else self.first(x)

    model, batch = Sometimes().eval(), torch.randn(4, 8)
    measurement = measured(model, batch, low_rank(ranks=(2,), whitened=False))
    assert all(_uses(time_options(model, measurement, batch, repeats=1))[1])
    assert not any(_uses(time_options(model, measurement, batch[:2], repeats=1))[1])


def test_times_are_medians_of_the_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Chain(nn.Linear(4, 4, bias=False)).eval(), torch.randn(2, 4)
    pieces = iter([(100, 100, 100), (1, 10, 2), (1, 12, 3), (50, 11, 70)])  # before, in and after the layer
    moments: list[float] = []

    def now() -> float:
        if not moments:
            moments.extend(np.cumsum([0, *next(pieces)]))
        return moments.pop(0)

    monkeypatch.setattr(stopwatch, "clock_of", lambda _: now)
    measurement = time_options(model, measured(model, batch, prune_quantize(bits=(4,))), batch, repeats=3)
    assert set(measurement.resources["latency_s"]) == {11}
    assert measurement.fixed["latency_s"] == 1 + 3


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_other_programs_do_not_count_where_the_processor_tells(
    threads: int, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert stopwatch.clock_of(nn.Linear(1, 1)) is clock


def test_a_measurement_keeps_its_times(tmp_path: Path) -> None:
    model, batch = KINDS["conv2d"][0]().eval(), KINDS["conv2d"][1]()
    before = measured(model, batch, OPTIONS)
    timed = time_options(model, before, batch, repeats=1)
    assert set(timed.resources) == set(before.resources) | {"latency_s"}
    timed.save(tmp_path / "measurement.npz")
    loaded = Measurement.load(tmp_path / "measurement.npz")
    asked = {"latency_s": 0.9, "bytes": 0.5}
    assert formulate(loaded, asked).fingerprint() == formulate(timed, asked).fingerprint()
    assert formulate(loaded, asked).budgets["latency_s"] == 0.9 * timed.original["latency_s"]
    assert time_options(model, loaded, batch, repeats=1).resources.keys() == timed.resources.keys()


def test_the_model_is_left_as_it_was() -> None:
    model, batch = Reused().train(), torch.randn(3, 5)
    model.out.weight.requires_grad_(False)
    before = Measurement.fingerprint_of(model)
    time_options(model, measured(model, batch, low_rank(ranks=(1,), whitened=False)), batch, repeats=1)
    assert model.training
    assert model.first.weight.requires_grad
    assert not model.out.weight.requires_grad
    assert Measurement.fingerprint_of(model) == before
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in model.modules())


def test_what_cannot_be_timed_is_refused() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.turn = nn.Linear(4, 4), nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            return self.a(self.b(x)) if self.turn % 2 else self.b(self.a(x))

    model, batch = Alternating(), torch.randn(2, 4)
    measurement = measured(model, batch, low_rank(ranks=(1,), whitened=False))
    with pytest.raises(ModelError, match="in a different order"):
        time_options(model, measurement, batch)
    with pytest.raises(ModelError, match="not the model that was measured"):
        time_options(Alternating(), measurement, batch)
    with pytest.raises(DataError, match=r"the model does not accept the batch \(a tensor of shape \(1, 7\)\)"):
        time_options(model, measurement, torch.zeros(1, 7))
    with pytest.raises(OptionsError, match="repeats must be a whole number from 1, found 0"):
        time_options(model, measurement, batch, repeats=0)


def test_compress_times_the_options_once_when_a_budget_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    torch.manual_seed(0)
    model, data = Chain(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval(), [torch.randn(2, 24)]
    settings: Any = {
        "budget": {"latency_s": 0.7, "bytes": 0.9},
        "options": low_rank(whitened=False),
        "folder": tmp_path / "run",
    }
    result = compress(model, data, **settings)
    assert result.report.usage["latency_s"] <= 0.7 * result.report.original["latency_s"]
    assert work_of(result.model, data[0], work) <= 0.7 * work_of(model, data[0], work)
    assert "| latency_s |" in (tmp_path / "run" / "summary.md").read_text()
    monkeypatch.setattr(stopwatch, "clock_of", None)  # the times are in the file
    assert compress(model, data, **settings).report.usage == result.report.usage


def _uses(measurement: Measurement) -> list[list[float]]:
    sizes = np.cumsum([len(options) for options in measurement.transforms])[:-1]
    return [own.tolist() for own in np.split(measurement.resources["latency_s"], sizes)]


class Residual(nn.Module):
    """Two branches of the same shape and one of another, each with a connection around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16)) for width in (24, 24, 8)
        )
        self.norm, self.last = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(self.norm(x))
        return self.last(self.norm(x))


def test_any_choice_of_channels_takes_what_the_smaller_network_takes(work: Work, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, batch = Residual().eval(), torch.randn(5, 6)
    measurement = measure(model, [batch], prune_channels(keep=(0.5, 0.25, 0.0)), loss="mse")
    progress: list[TimingProgress] = []
    timed = time_options(model, measurement, batch, on_progress=progress.append)
    assert [(own.layers, own.total_layers) for own in progress] == [(2, 3), (3, 3)]
    assert timed.original["latency_s"] == work_of(model, batch, work)
    problem = formulate(timed, {"latency_s": 1.0})
    for choice in ([0, 0, 0], [1, 0, 2], [2, 3, 1], [3, 3, 3], [0, 3, 0]):
        smaller = compressed(model, timed, solution(choice))
        assert problem.evaluate(choice).usage["latency_s"] == pytest.approx(work_of(smaller, batch, work), rel=1e-9)
    latency.save_times(timed, tmp_path / "times.npz")
    again = latency.load_times(measurement, tmp_path / "times.npz")
    np.testing.assert_array_equal(again.resources["latency_s"], timed.resources["latency_s"])


def test_a_budget_for_time_is_kept_by_channels_and_codes_together(work: Work) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, batch = Residual().eval(), torch.randn(16, 6)
    options = prune_channels(keep=(0.5, 0.0)) + prune_quantize(bits=(4, 8), sparsity=(0,))
    result = compress(model, [batch], budget={"latency_s": 0.8, "bytes": 0.3}, options=options, loss="mse", guard=False)
    limit = 0.8 * work_of(model, batch, work)
    assert result.report.usage["latency_s"] <= limit
    assert work_of(result.model, batch, work) <= limit


def test_rounds_approach_a_budget_in_seconds_however_small(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, data = Residual().eval(), list(torch.randn(32, 6).split(8))
    monkeypatch.setattr(stopwatch, "clock_of", lambda _: lambda: work.done * 1e-9)  # amounts below 1 are no shares
    given: Any = {"options": prune_channels(keep=(0.75, 0.5, 0.25, 0.0)), "loss": "mse", "time_limit": 2}
    report = compress(model, data, budget={"latency_s": "70%"}, rounds=2, **given).report
    whole = report.original["latency_s"]
    assert report.warnings == () or not any("not possible" in warning for warning in report.warnings)
    assert [entry.name for entry in report.rounds] == ["all at once", "round 1", "round 2"]
    for entry, share in zip(report.rounds[1:], (0.7**0.5, 0.7), strict=True):
        assert entry.usage["latency_s"] <= share * whole * (1 + 1e-9)  # sums of floats
    met = compress(model, data, budget={"latency_s": "100%"}, **given).report
    assert {part.option for part in met.parts} == {"keep"}


def test_times_of_channels_that_share_a_layer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    measurement = measure(model, [torch.randn(4, 4)], prune_channels(keep=(0.5,)), loss="mse")
    with pytest.raises(OptionsError, match=r"'2\.weight' lies along the channels of both '0' and '2'"):
        time_options(model, measurement, torch.randn(4, 4))
