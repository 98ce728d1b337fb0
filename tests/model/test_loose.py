"""Tensors that no file holds are told apart from what a pass leaves behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, load_compressed, prune_quantize, save_compressed
from qcompress.errors import ArtefactError
from qcompress.model.loose import constants_read, loose_state

BITS = prune_quantize(bits=(4, 8), sparsity=(0,))


class Box:
    net: nn.Module


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


def inputs() -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def read(model: nn.Module) -> list[str]:
    return constants_read(model, inputs()[0], None)


def test_parameters_in_plain_attributes_are_found_wherever_they_are() -> None:
    model = Net()
    model.one = [nn.Parameter(torch.ones(2))]  # type: ignore[assignment]
    model.two = {"w": (nn.Parameter(torch.ones(2)),)}  # type: ignore[assignment]
    model.three = Box()  # type: ignore[assignment]
    model.three.net = nn.Linear(2, 2, bias=False)
    model.four = [torch.ones(2, requires_grad=True)]  # type: ignore[assignment]
    model.same, model.box = [model.a.weight, model.a], Box()  # type: ignore[assignment]
    model.box.net = model.b
    model.others = [nn.Linear(2, 2)]  # type: ignore[assignment]  # a file holds these
    assert set(loose_state(model)) == {"one[0]", "two['w'][0]", "three.net.weight", "four[0]"}
    assert not read(model)


class Constants(Net):
    """Reads a constant; stores activations, of which it reads one in the next pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.tables = torch.randn(8), {"scale": torch.randn(8)}
        self.unused, self.window, self.seen = torch.randn(8), self.a.weight.data[:2], torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.last = (x - self.mean) * self.tables["scale"] + self.window.mean() + 0 * self.seen
        self.seen = self.last[0]
        return super().forward(self.last)


def test_constants_that_a_pass_reads_are_told_from_what_it_stores() -> None:
    model = Constants()
    model(inputs()[0])
    seen = model.seen
    assert sorted(read(model)) == ["mean", "tables['scale']"]
    assert model.seen is seen


def test_constants_are_a_warning_as_they_may_be_the_same_in_every_new_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Constants()  # in copies of it, and in loaded models, the window is no longer one onto the weight
    report = compress(model, inputs(), budget={"bytes": 0.6}, options=BITS, solver="greedy", folder=tmp_path).report
    assert [text for text in report.warnings if "plain tensors" in text] == [
        "save_compressed() leaves out plain tensors that the model computes with (mean, tables['scale'], window): "
        "load_compressed() takes them from the model that model_factory makes. With register_buffer a file holds them"
    ]


def test_parameters_are_refused_before_measuring_where_a_file_is_written(tmp_path: Path) -> None:
    model, told = Net(), []  # type: ignore[var-annotated]
    model.ws = [nn.Parameter(torch.ones(8))]  # type: ignore[assignment]
    model.a.register_forward_hook(lambda layer, given, output: output)
    for more in ({"folder": tmp_path / "run"}, {"budget": {"file_bytes": 5000}}):
        with pytest.raises(ArtefactError, match=r"'ws\[0\]' is a parameter or buffer that PyTorch does not see"):
            compress(model, inputs(), **{"budget": {"bytes": 0.6}, "options": BITS, "on_measure": told.append, **more})
    assert not told
    result = compress(model, inputs(), budget={"bytes": 0.6}, options=BITS, solver="greedy")
    assert [text for text in result.report.warnings if "would refuse this model: 'ws[0]'" in text]
    with pytest.raises(ArtefactError, match=r"'ws\[0\]' is a parameter"):
        save_compressed(result.model, tmp_path / "model")


class Expanded(Net):
    """A buffer, a weight and a bias with fewer numbers in memory than they show."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", (torch.arange(8.0) / 10).expand(3, 8))
        self.register_buffer("passing", torch.zeros(1).expand(8), persistent=False)
        self.b.weight = nn.Parameter(torch.randn(1, 8).expand(4, 8))
        self.b.bias = nn.Parameter(torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table.sum(0) + self.passing)


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
def test_expanded_tensors_are_stored_in_full(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Expanded()
    result = compress(
        model, inputs(), budget={"bytes": 0.8}, options=BITS, method=method, solver="greedy", folder=tmp_path
    )
    assert model.b.weight.stride() == (0, 1)
    loaded = load_compressed(tmp_path / "model.safetensors", Expanded)
    assert torch.equal(loaded(inputs()[0]), result.model(inputs()[0]))
