"""Graphs of recurrent layers: their weights are constants for ONNX Runtime, under their own names in the file."""

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qcompress
from qcompress.engines import onnx_tracing
from qcompress.engines.onnxruntime import OnnxRuntime
from tests.quick import slow_but

ENGINE = OnnxRuntime(threads=1)


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.memory = kind(16, 24, batch_first=True, bidirectional=True)

    def forward(self, words: torch.Tensor) -> Any:
        return self.memory(self.words(words))[0][:, -1]


@pytest.mark.parametrize("kind", slow_but([nn.LSTM], [nn.LSTM, nn.GRU]))
def test_weights_of_recurrent_layers_are_rearranged_when_the_file_is_loaded(kind: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recurrent(kind).eval()
        words = torch.randint(40, (3, 7))
    path = qcompress.export(model, tmp_path / "whole.onnx", target=ENGINE, example=words).path
    assert {name for name, _ in model.named_parameters()} <= {
        item.name.removeprefix("model.") for item in onnx.load(path).graph.initializer
    }
    batches = [words, words[:1, :5]]
    for output, batch in zip(ENGINE.run(path, batches).outputs, batches, strict=True):
        torch.testing.assert_close(output, model(batch))
    assert ENGINE.check(path, model) == ""

    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    settings.log_severity_level = 3  # no word on saving an optimized file
    onnxruntime.InferenceSession(path, settings)
    graph = onnx.load(tmp_path / "loaded.onnx").graph
    constants = {item.name for item in graph.initializer}
    layers = [node for node in graph.node if node.op_type == kind.__name__]
    assert layers
    assert all(set(node.input[1:4]) <= constants for node in layers)


def test_a_bag_of_embeddings_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2))
    with pytest.raises(qcompress.errors.EngineError, match="'0' is an EmbeddingBag"):
        qcompress.export(model, tmp_path / "model.onnx", target=ENGINE, example=torch.zeros(2, 3, dtype=torch.int64))
    assert not list(tmp_path.iterdir())


def test_the_exporters_table_of_translations_is_made_once_and_no_export_changes_it() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    unchanged, batch = vars(ONNXRegistry)["from_torchlib"], torch.zeros(2, 4)
    graphs = [onnx_tracing.trace(layer, batch) for layer in (nn.Linear(4, 3), nn.ReLU())]
    made = onnx_tracing._translations.cache_info().misses
    with onnx_tracing._translations_kept():
        ONNXRegistry().from_torchlib(opset_version=onnx_tracing.OPSET).functions.clear()
    graphs.append(onnx_tracing.trace(nn.ReLU(), batch))
    assert onnx_tracing._translations.cache_info().misses == made > 0
    assert graphs[1] == graphs[2]
    assert vars(ONNXRegistry)["from_torchlib"] is unchanged


def test_an_exporter_that_keeps_its_translations_elsewhere_makes_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
    with onnx_tracing._translations_kept():
        pass
