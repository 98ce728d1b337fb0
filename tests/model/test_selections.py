"""Hard decisions are found by what is computed, and are a warning wherever a prediction is shown."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.cli import main
from qcompress.model.parts import survey
from tests.engines.tiny import write_tokenizer
from tests.opened_models import in_memory, saved, tokens
from tests.quick import slow_but

OPTIONS = qcompress.prune_quantize(bits=(3, 4), sparsity=(0,))


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function
        self.book = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        match self.function:
            case "largest":
                return torch.zeros_like(x).scatter(1, x.topk(2, dim=1).indices, 1.0) * x
            case "code":
                return self.book[torch.cdist(x, self.book).argmin(dim=1)]
            case "order":
                return x.gather(1, x.argsort(dim=1))
            case "switch":
                return x * nn.functional.one_hot(x.max(dim=-1)[1], 6)
            case "pooled":
                return x.max(dim=1, keepdim=True).values + x
            case "sorted":
                return x.sort(dim=1).values
            case "given":
                return x[:, torch.tensor([3, 1, 2, 0, 4, 5]).argsort()]
        raise AssertionError


def network(function: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Between(function), nn.Linear(6, 3)).eval()


@pytest.mark.parametrize("function", ["largest", "code", "order", "switch"])
def test_what_selects_by_computed_numbers_is_found(function: str) -> None:
    assert survey(network(function), [torch.randn(8, 4)]).selecting == ("1",)


@pytest.mark.parametrize("function", ["pooled", "sorted", "given"])
def test_values_alone_and_constant_places_are_no_decision(function: str) -> None:
    assert survey(network(function), [torch.randn(8, 4)]).selecting == ()


def test_a_model_that_selects_itself_and_one_that_fails_leave_nothing_behind() -> None:
    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * nn.functional.one_hot(y.argmax(dim=1), 3)

    model = nn.Sequential(nn.Sequential(Whole(4, 3)))
    assert survey(model, [torch.randn(8, 4)]).selecting == ("0",)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", slow_but(["Mixtral"], ["Mixtral", "Qwen2Moe"]))
def test_routers_of_experts_are_found_in_memory_and_block_by_block(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "model", num_local_experts=4, num_experts=4, num_experts_per_tok=2)
    gates = tuple(f"model.layers.{block}.mlp.gate" for block in range(3))
    for model in (in_memory(folder), qcompress.open_model(folder)):
        measurement = qcompress.measure(model, [tokens(1, 8)], OPTIONS, method="sampled")
        assert measurement.selecting == gates
    measurement.save(tmp_path / "m.npz")
    assert qcompress.Measurement.load(tmp_path / "m.npz").selecting == gates


@pytest.mark.parametrize("method", ["fisher", "sampled", "direct"])
def test_reports_warn_unless_every_option_was_tried(method: str, tmp_path: Path) -> None:
    data = [torch.randn(64, 4)]
    reports = [
        qcompress.compress(network(function), data, budget={"bytes": 0.8}, options=OPTIONS, method=method,
                           solver="dp", pairs=False, folder=tmp_path / function).report
        for function in ("largest", "pooled")
    ]  # fmt: skip
    warned = [any("hard decisions" in text and "1 module, such as '1'" in text for text in report.warnings)
              for report in reports]  # fmt: skip
    assert warned == [method != "direct", False]
    assert ("hard decisions" in (tmp_path / "largest" / "summary.md").read_text()) is warned[0]
    assert ("standard error of sampling the data, and of nothing else:" in reports[0].to_markdown()) is (
        method == "sampled"
    )


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
def test_the_command_line_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(saved("Mixtral", Path("model"), vocab_size=320, num_local_experts=4))
    Path("text.txt").write_text("the cat and the man " * 50)
    words = ["hf:model", "--text", "text.txt", "--length", "8", "--windows", "4", "--bits", "4", "--sparsity", "0"]
    assert main(["measure", *words, "--no-compensated", "--json"]) == 0
    assert "hard decisions" in json.loads(capsys.readouterr().out)["warnings"][0]
    assert main(["compress", *words, "--no-compensated", "--budget", "bytes=50%", "--solver", "dp", "--no-pairs"]) == 0
    assert "WARNING: the network makes hard decisions" in " ".join(capsys.readouterr().err.split())
