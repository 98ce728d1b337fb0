"""Choices for ONNX Runtime: what is on offer, budgets for bytes and seconds, and the losses that are reported."""

import errno
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.traces import traced_once
from formulations import InfeasibleBudgetError
from qcompress.engines.legal import FILE_BYTES, for_engine
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.engines.registry import as_engine
from qcompress.errors import EngineError, OptionsError
from qcompress.measuring.latency import load_times
from tests.measurements import Chain, measured
from tests.quick import slow_but

EXACT = OnnxRuntime(accuracy_level=1, threads=1)
RANKS = qcompress.low_rank(ratios=(0.5,), kinds=("channels",))


def test_file_bytes_are_a_resource_and_the_budget_holds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Chain(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 10)).eval(), torch.randn(8, 200)
    measurement = qcompress.measure(model, [batch], EXACT.options())
    legal = for_engine(EXACT, model, measurement, batch)
    found = qcompress.solve(qcompress.formulate(legal, {FILE_BYTES: 20_000.0}), "brute-force")
    file = qcompress.export(qcompress.apply(model, legal, found), tmp_path / "small.onnx", target=EXACT, example=batch)
    assert file.size_bytes == found.usage[FILE_BYTES] <= 20_000


@pytest.mark.parametrize("budget", [{"file_bytes": "60%"}, pytest.param({"bytes": "40%"}, marks=pytest.mark.slow)])
def test_what_the_graph_does_not_allow_is_not_offered(budget: dict[str, str], tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(200, 64)
            self.fc = nn.Linear(64, 64)
            self.out = nn.Linear(64, 16)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.out(self.fc(self.words(words)) + self.fc.weight.sum(0)).mean(1)

    torch.manual_seed(0)
    data = [torch.randint(0, 200, (16, 6)) for _ in range(2)]
    result = qcompress.compress(
        Tagger().eval(), data, budget=budget, target="onnxruntime", folder=tmp_path / "run", time_limit=2
    )
    integer = {
        part.name: any("activations" in label for label in labels)
        for part, labels in zip(result.measurement.parts, result.measurement.labels, strict=True)
    }
    assert integer == {"words": False, "fc": False, "out": True}
    qcompress.export(result.model, tmp_path / "small.onnx", target=EXACT, example=data[0])
    assert qcompress.verify(tmp_path / "small.onnx", result.model, data, target=EXACT, memory=False).ok


def test_options_are_timed_in_the_engine_and_the_budget_is_kept_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    data = [torch.randn(32, 256)]
    options = qcompress.integer_products() + qcompress.prune_quantize(bits=(4,), group_size=(32, 20))
    result = qcompress.compress(
        model, data, budget={"latency_s": 1.0}, options=options, target=EXACT, folder=tmp_path / "run", time_limit=5
    )
    times, kept = (
        result.measurement.resources["latency_s"],
        [0, *np.cumsum([len(o) for o in result.measurement.labels])],
    )
    assert float(times[kept[:-1]].sum()) + result.measurement.fixed["latency_s"] == pytest.approx(
        result.measurement.original["latency_s"]
    )
    expanded = result.measurement.labels[0].index("4 bits in groups of 20")  # expanded when the file is loaded
    assert times[expanded] == times[0]
    assert result.report.usage["latency_s"] <= result.report.budgets["latency_s"]
    assert result.report.latency_measured_s is not None
    assert result.report.latency_measured_s > 0
    assert "time in the engine" in result.report.to_markdown()
    kept_times = load_times(replace(result.measurement, cost=np.zeros(len(times))), tmp_path / "run" / "latency.npz")
    assert np.array_equal(kept_times.resources["latency_s"], times)


def test_layers_of_one_kind_are_timed_as_one() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    batch, told = torch.randn(8, 64), []
    legal = for_engine(EXACT, model, measured(model, batch, qcompress.integer_products()), batch)
    timed = EXACT.time_options(model, legal, batch, told.append)
    times = timed.resources["latency_s"].reshape(3, -1)
    assert [own.layers for own in told] == [3]
    assert np.allclose(times, times[0])


def test_an_engine_that_times_nothing_says_so_before_anything_runs() -> None:
    with pytest.raises(EngineError, match=r"'compressed-tensors' does not time options.*'onnxruntime'"):
        qcompress.compress(
            nn.Linear(4, 4), [torch.randn(2, 4)], budget={"latency_s": 0.5}, target="compressed-tensors", output="x"
        )


def test_wishes_that_the_engine_cannot_grant_are_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, file = (
        Chain(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval(),
        [torch.randn(16, 64)],
        tmp_path / "x",
    )
    in_4_bits = qcompress.prune_quantize(bits=(4,), group_size=32)
    with monkeypatch.context() as patched, pytest.raises(InfeasibleBudgetError, match="file_bytes"):
        patched.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
        qcompress.compress(model, data, budget={"file_bytes": 100.5}, options=in_4_bits, target=EXACT, output=file)
    with pytest.raises(EngineError, match="runs none of the options on offer: .*no kernel for '3 bits"):
        qcompress.compress(
            model, data, budget={"bytes": 0.5}, options=qcompress.prune_quantize(bits=(3,)), target=EXACT, output=file
        )

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        qcompress.export(model, file, target=EXACT, example=data[0])
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_file_and_the_least_time_for_a_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    data, options = [torch.randn(32, 200)], qcompress.prune_quantize(bits=(4, 8), group_size=32)
    for resource in (FILE_BYTES, "latency_s"):
        result = qcompress.compress(
            model, data, budget={"loss": 1e-3}, minimize=resource, options=options, target=EXACT, time_limit=10
        )
        smallest = result.report.smallest
        assert smallest is not None
        assert result.report.loss_predicted <= 1e-3
        assert smallest["at_least"] <= smallest["usage"] <= result.report.original[resource]
        choices = itertools.product(*(range(len(own)) for own in result.measurement.labels))
        judged = [result.problem.evaluate(np.array(choice)) for choice in choices]
        least = min(own.usage[resource] for own in judged if own.objective <= 1e-3)
        assert smallest["usage"] == pytest.approx(least)
        assert result.report.usage[resource] == pytest.approx(smallest["usage"])


class Outlying(nn.Module):
    """One hidden channel is many times as large as the others, and the next layer's weights for it as small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        with torch.no_grad():
            self.first.weight[7] *= 60
            self.middle.weight[:, 7] *= 0.01
            self.last.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def test_reported_losses_are_those_of_the_file_with_the_inputs_that_it_rounds(tmp_path):
    """At accuracy level 4 the rounding of inputs loses many times as much as that of the weights."""
    torch.manual_seed(0)
    model, data = Outlying().eval(), [torch.randn(32, 32) for _ in range(4)]
    result = qcompress.compress(
        model, data, budget={"file_bytes": "45%"}, options=qcompress.prune_quantize(bits=(8,), group_size=32),
        target=OnnxRuntime(threads=1), output=tmp_path / "small.onnx", pairs=False, solver="dp",
    )  # fmt: skip
    outputs = torch.cat(OnnxRuntime(threads=1).run(tmp_path / "small.onnx", data).outputs).double().log_softmax(-1)
    goal = model(torch.cat(data)).detach().double().log_softmax(-1)
    true = float((goal.exp() * (goal - outputs)).sum(-1).mean())
    assert result.report.loss_measured == pytest.approx(true, rel=1e-2)  # additions in another order
    assert true > 5 * qcompress.mean_loss(model, result.model, data)


@pytest.mark.parametrize(("options", "shapes"), [
    (qcompress.prune_quantize(bits=(4,), group_size=32, symmetric=False), (33, 256)),
    pytest.param(qcompress.prune_quantize(bits=(2, 8), group_size=None), (33, 256), marks=pytest.mark.slow),
    (qcompress.integer_products(("dynamic",)), (32, 64)),
    pytest.param(RANKS, (33, 256), marks=pytest.mark.slow),
    (RANKS.then(qcompress.prune_quantize(bits=(4,), group_size=32)), (48, 128)),
])  # fmt: skip
def test_bits_per_weight_are_those_of_the_file(
    options: qcompress.Options, shapes: tuple[int, int], tmp_path: Path
) -> None:
    import onnx

    torch.manual_seed(0)
    narrow, wide = shapes
    model, batch = Chain(nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, narrow)).eval(), torch.randn(64, narrow)
    with traced_once():
        result = qcompress.compress(
            model, [batch], budget={"bits_per_weight": 31}, target=EXACT, options=options, guard=False, pairs=False,
            output=tmp_path / "small.onnx", solver="brute-force",
        )  # fmt: skip
    bits = sum(8 * len(item.raw_data) for item in onnx.load(tmp_path / "small.onnx").graph.initializer
               if "bias" not in item.name)  # fmt: skip
    assert result.report.usage["bits_per_weight"] == pytest.approx(bits / (2 * narrow * wide), rel=1e-9)
    least = result.problem.minimum_usage()["bits_per_weight"]
    with pytest.raises(InfeasibleBudgetError, match=f"smallest possible use is {least:.6g}"):
        qcompress.compress(model, [batch], budget={"bits_per_weight": 0.2}, target=EXACT, options=options)


def test_the_smallest_use_is_the_same_before_measuring_and_after() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    data = [torch.randn(32, 32) for _ in range(2)]

    def smallest(asked: int, options: qcompress.Options) -> str:
        with pytest.raises(InfeasibleBudgetError) as error:
            qcompress.compress(model, data, budget={FILE_BYTES: asked}, target=EXACT, options=options, guard=False)
        return str(error.value)

    with traced_once():
        told = smallest(1000, qcompress.low_rank(kinds=("channels",)))
        least = int(told.partition("smallest possible use is ")[2].partition(";")[0].partition(".")[0].replace(",", ""))
        assert f"smallest possible use is {least:,}" in smallest(least - 1, qcompress.low_rank(kinds=("channels",)))
        result = qcompress.compress(
            model, data, budget={FILE_BYTES: least}, target=EXACT, options=qcompress.low_rank(kinds=("channels",)),
            guard=False, solver="greedy",
        )  # fmt: skip
        assert result.report.usage[FILE_BYTES] == least
        assert "every choice uses at least" in smallest(500, qcompress.low_rank(energies=(0.9,), kinds=("channels",)))


@pytest.mark.parametrize(("settings", "told"), [
    ({"accuracy_level": 9}, r"accuracy_level must be 1 \(float32\) or 4 \(8 bits\), found 9"),
    ({"threads": -7}, "threads of engine 'onnxruntime' must be a whole number from 0, found -7"),
    ({"threads": "two"}, "threads of engine 'onnxruntime' must be a whole number from 0, found 'two'"),
])  # fmt: skip
def test_settings_that_there_are_not_are_told_first(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionsError, match=told):
        as_engine(OnnxRuntime(**settings))


def normalised(kind: str) -> nn.Module:
    """Two layers, the first of which computes its weight."""
    layer = nn.Linear(64, 64)
    if kind == "pruned":
        nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    else:
        getattr(nn.utils.parametrizations, kind)(layer)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 10)).eval()


@pytest.mark.parametrize("kind", slow_but(["weight_norm", "pruned"], ["weight_norm", "spectral_norm", "pruned"]))
def test_weights_that_are_computed_take_the_bytes_of_plain_ones(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch, path = normalised(kind), torch.randn(64, 64), tmp_path / "small.onnx"
    names, wanted = list(model.state_dict()), model(batch).detach()
    with traced_once():
        result = qcompress.compress(
            model, [batch], budget={"file_bytes": "40%"}, target=EXACT, output=path, guard=False, solver="greedy",
            options=qcompress.prune_quantize(bits=(4, 8), group_size=32),
        )  # fmt: skip
        assert path.stat().st_size == result.report.usage[FILE_BYTES]
        qcompress.export(model, tmp_path / "whole.onnx", target=EXACT, example=batch)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(EXACT.run(tmp_path / "whole.onnx", [batch]).outputs[0], wanted)
    assert qcompress.verify(tmp_path / "whole.onnx", model, [batch], target=EXACT, memory=False).ok
