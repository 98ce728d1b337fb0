"""An ONNX file gives the same in every session, with default options and others, with and without VNNI."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompress
from benchmarks.traces import traced_once
from qcompress.engines import onnx_tracing
from qcompress.engines.legal import for_engine
from tests.engines.test_onnxruntime import EXACT, FLOAT, exported, operators
from tests.measurements import KINDS, Chain, measured, solution

SESSIONS: tuple[dict[str, str], ...] = (
    {},
    {"disable_quant_qdq": "1"},
    {"x64quantprecision": "1"},
    {"qdqisint8allowed": "0"},
    {"enable_quant_qdq_cleanup": "1"},
)
EXPANDED = qcompress.prune_quantize(bits=(2, 4, 8), sparsity=(0,), group_size=(5, None))
EXPANDED += qcompress.prune_quantize(bits=(2, 4, 8), sparsity=(0,), group_size=(5, None), symmetric=False)


def session(path: Path, entries: dict[str, str], loaded: Path | None = None) -> Any:
    """A session as a user opens it, with its defaults except for the ``entries``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if loaded is not None:
        options.optimized_model_filepath = str(loaded)
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    return onnxruntime.InferenceSession(str(path), options)


class Turned(nn.Module):
    """Linear layers on three dimensions: behind a permutation, and along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.across = nn.Linear(24, 40), nn.Linear(40, 7), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)).permute(1, 0, 2)).permute(1, 0, 2)
        return self.across(x.transpose(1, 2))


class Recurrent(nn.Module):
    """Words, a recurrent layer and a head, on three dimensions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(20, 24), getattr(nn, kind)(24, 16, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.words(ids))[0])


MODELS: dict[str, tuple[Any, Any]] = KINDS | {
    "linear on three dimensions": (
        lambda: Chain(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 7)),
        lambda: torch.randn(4, 5, 20),
    ),
    "turned": (Turned, lambda: torch.randn(4, 5, 24)),
    "LSTM": (lambda: Recurrent("LSTM"), lambda: torch.randint(20, (3, 5))),
    "GRU": (lambda: Recurrent("GRU"), lambda: torch.randint(20, (3, 5))),
}


QUICK = ("mixed", "tied", "turned", "LSTM")


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
                                  for kind in MODELS])  # fmt: skip
def test_expanded_weights_give_the_same_in_every_session(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime does not load, or rounds the inputs of, some products with weights that DequantizeLinear expands."""
    torch.manual_seed(0)
    make, make_batch = MODELS[kind]
    model, batch, path = make().eval(), make_batch(), tmp_path / "small.onnx"
    with traced_once():
        legal = for_engine(EXACT, model, measured(model, batch, EXPANDED), batch)
        for start in range(0, len(EXPANDED.offers), min(len(legal.parts), 3)):
            choice = [(start + place) % (len(own) - 1) + 1 if len(own) > 1 else 0
                      for place, own in enumerate(legal.transforms)]  # fmt: skip
            smaller = qcompress.apply(model, legal, solution(choice))
            qcompress.export(smaller, path, target=EXACT, example=batch)
            for entries in SESSIONS:
                run = session(path, entries)
                output = torch.from_numpy(run.run(None, onnx_tracing.feed_of(run, batch))[0])
                torch.testing.assert_close(output, smaller(batch).detach(), atol=FLOAT, rtol=0)


def test_weights_are_expanded_once_when_a_session_with_default_options_loads_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = Chain(nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 40)).eval(), torch.randn(3, 5, 40)
    with traced_once():
        for offer in EXPANDED.offers:
            exported(model, batch, qcompress.Options((offer,)), tmp_path / "small.onnx")
            session(tmp_path / "small.onnx", {}, tmp_path / "loaded.onnx")
            assert set(operators(tmp_path / "loaded.onnx")) == {"MatMul", "Add", "Relu"}


class Largest(nn.Module):
    """Convolutions and a Linear layer side by side, all of whose weights are 1 or -1; the input has 5 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Linear(8, 6), nn.Conv1d(8, 6, 5), nn.Conv2d(8, 6, 3), nn.Conv3d(8, 6, 2), nn.Conv2d(8, 6, 3, groups=2),
            nn.Conv2d(8, 16, 3, groups=8), nn.Conv1d(8, 8, 5, groups=8), nn.Conv2d(8, 8, 5, groups=8),
            nn.Conv3d(8, 8, 3, groups=8),
        ])  # fmt: skip
        self.dims = [2, *(len(layer.kernel_size) + 2 for layer in self.layers[1:])]  # type: ignore[arg-type]
        with torch.no_grad():
            for layer in self.layers:
                weight = layer.weight
                weight.copy_(torch.where(torch.rand(weight.shape) < 0.8, 1.0, -1.0))

    def each(self, x: Tensor) -> list[Tensor]:
        """The outputs of the layers."""
        inputs = [x[(..., *[0] * (x.ndim - dims))] for dims in self.dims]
        return [layer(one).flatten(1) for layer, one in zip(self.layers, inputs, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.each(x), 1)


@pytest.mark.parametrize(("ranges", "bits"), [
    pytest.param(("static",), (8,), marks=pytest.mark.slow), (("static", "dynamic"), (8,)), (("static",), (7,)),
])  # fmt: skip
def test_products_of_the_largest_numbers_do_not_saturate(
    ranges: tuple[str, ...], bits: tuple[int, ...], tmp_path: Path
) -> None:
    """All weights and inputs are at the ends of their ranges: two products added in 16 bits would saturate."""
    torch.manual_seed(0)
    model, batch = Largest().eval(), torch.ones(2, 8, 5, 5, 5)
    smaller = exported(model, batch, qcompress.integer_products(ranges, bits=bits), tmp_path / "small.onnx")
    expected, widths = smaller(batch).detach(), [output.shape[1] for output in model.each(batch)]
    for entries in SESSIONS:
        run = session(tmp_path / "small.onnx", entries)
        output = torch.from_numpy(run.run(None, onnx_tracing.feed_of(run, batch))[0])
        for found, wanted in zip(output.split(widths, 1), expected.split(widths, 1), strict=True):
            # a sum that a convolution rounds may lie in the middle between two codes
            torch.testing.assert_close(found, wanted, atol=1.01 * float(wanted.abs().max()) / 255, rtol=0)
