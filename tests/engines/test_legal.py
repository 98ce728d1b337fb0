"""Parts that an engine has no encoding for: named as left unchanged, with the reason and their bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompress
from formulations import InfeasibleBudgetError
from qcompress.cli import main
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import NOTHING_IN_COMMON, by_number, for_engine
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.errors import EngineError
from qcompress.measurement import NOTHING_FITS, Measurement
from qcompress.pages.report_page import report_page
from tests.engines.tiny import tiny
from tests.engines.toy import Toy
from tests.opened_models import in_memory, saved, tokens

OPTIONS = qcompress.prune_quantize(bits=(4, 8), sparsity=(0,), group_size=(32,))
EXPERTS = "model.layers.0.mlp.experts."


class Recurrent(nn.Module):
    """An LSTM and a layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.memory, self.out = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 32)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.memory(x)[0][:, -1])


def sequences(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 5, 32, generator=generator) for _ in range(3)]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A mixture of experts, whose weights are in parameters of three dimensions."""
    folder = tmp_path_factory.mktemp("experts")
    return in_memory(saved("Mixtral", folder, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2))


def test_parts_that_the_engine_does_not_store_are_left_unchanged_with_its_reason(
    experts: nn.Module, tmp_path: Path
) -> None:
    result = qcompress.compress(
        experts, [tokens(4, 8)] * 3, budget={"bits_per_weight": 5}, options=OPTIONS, pairs=False,
        target=CompressedTensors(), folder=tmp_path / "run",
    )  # fmt: skip
    report = result.report
    left = [name for name in report.skipped if name.startswith(EXPERTS)]
    assert len(left) == 8  # four experts with two weights
    assert not any(part.name.startswith(EXPERTS) for part in report.parts)
    assert all(report.skipped[name].startswith("only Linear layers") for name in left)
    expected = sum(weight.nbytes for name, weight in experts.named_parameters() if name.startswith(EXPERTS))
    assert sum(report.skipped_bytes[name] for name in left) == expected

    share = sum(part.bytes_before for part in report.parts) / report.original["bytes"]
    assert share < 0.5
    told = f"bits_per_weight counts the parts that have a choice: {100 * share:.3g} % of the bytes"
    reason = "only Linear layers can have integer weights, not MixtralExperts "
    reason += f"(8 times, {100 * expected / report.original['bytes']:.3g} % of the bytes)"
    assert reason in report.to_markdown().partition("Left unchanged")[2]
    for text in (told, reason):
        assert text in report.to_markdown()
        assert text in report_page(report)

    again = Measurement.load(tmp_path / "run" / "measurement.npz")
    assert again.kept == ()  # measured for any engine
    result.measurement.save(tmp_path / "restricted.npz")
    assert Measurement.load(tmp_path / "restricted.npz").unchanged == result.measurement.unchanged


def test_the_command_line_lists_them(experts: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measurement = qcompress.measure(experts, [tokens(4, 8)], OPTIONS)
    for_engine(CompressedTensors(), experts, measurement).save(tmp_path / "restricted.npz")
    assert main(["show", str(tmp_path / "restricted.npz")]) == 0
    told, _, left = " ".join(capsys.readouterr().out.split()).partition("left unchanged: ")
    assert "experts" not in told
    assert "only Linear layers can have integer weights, not MixtralExperts (8 times, " in left


def test_an_unreachable_budget_names_the_parts_that_cannot_be_smaller(experts: nn.Module) -> None:
    with pytest.raises(
        InfeasibleBudgetError, match=r"are fixed: part 'model\.layers\.0\.mlp\.experts\.\w+\[\S+': .*Linear"
    ):
        qcompress.compress(
            experts, [tokens(4, 8)] * 3, budget={"file_bytes": "10%"}, options=OPTIONS, target=CompressedTensors()
        )


def test_weights_inside_a_recurrent_layer_are_left_unchanged_in_onnx_files() -> None:
    model, data = Recurrent(), sequences()
    legal = for_engine(OnnxRuntime(), model, qcompress.measure(model, data, OPTIONS), data[0])
    assert [item.name for item in legal.kept] == ["memory.weight_ih_l0", "memory.weight_hh_l0"]
    assert legal.kept[0].reason == "only weights of layers are compressed, not those inside LSTM"


def test_a_part_that_had_no_choice_before_gets_the_engines_own_reason(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path, intermediate_size=50, num_hidden_layers=1, dtype=torch.float16)
    legal = for_engine(LlamaCpp(), model, qcompress.measure(model, [tokens(2, 8)], LlamaCpp().options()))
    assert [item.name for item in legal.kept] == ["model.layers.0.mlp.down_proj"]
    assert "rows are a multiple of 32 weights, these have 50" in legal.kept[0].reason


def test_without_an_engine_options_that_do_not_fit_are_the_reason() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1, bias=False), nn.Linear(1, 1))
    measurement = qcompress.measure(model, [torch.randn(16, 32)], qcompress.prune_quantize(bits=(8,)), loss="mse")
    assert [(item.name, item.size_bytes, item.reason) for item in measurement.kept] == [("3", 4, NOTHING_FITS)]


def test_tied_parts_without_a_common_option_say_so() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    options = {"0": qcompress.prune_quantize(bits=(2,), sparsity=(0,)),
               "*": qcompress.prune_quantize(bits=(4,), sparsity=(0,))}  # fmt: skip
    measurement = qcompress.measure(model, [torch.randn(16, 8)], options)
    legal = for_engine(Toy(tied=(("0", "2"),)), model, measurement)
    assert [(item.name, item.reason) for item in legal.kept] == [("0", NOTHING_IN_COMMON), ("2", NOTHING_IN_COMMON)]


@pytest.mark.parametrize("measured", [False, True])
def test_an_engine_that_runs_nothing_says_how_many_parts_have_which_reason(measured: bool, tmp_path: Path) -> None:
    model, engine = in_memory(saved("GPT2", tmp_path)), CompressedTensors()
    counted = r"not Conv1D \(12 parts, such as 'transformer\.h\.0.*; .* tied \('.*wte'\); .*not Embedding \('.*wpe'\)"
    with pytest.raises(EngineError, match=counted):
        if measured:
            for_engine(engine, model, qcompress.measure(model, [tokens(2, 8)], OPTIONS))
        else:
            qcompress.compress(model, [tokens(2, 8)] * 3, budget={"bytes": "50%"}, options=OPTIONS, target=engine)


def test_no_more_than_three_reasons_are_stated() -> None:
    assert by_number({str(n): f"reason {n}" for n in range(5)}).endswith("reason 2 ('2'); …")
