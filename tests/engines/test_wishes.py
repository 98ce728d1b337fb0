"""Wishes that cannot be met, for the engines of language models: one clear error each, and nothing half-written."""

import contextlib
import importlib.util
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qcompress
from formulations import InfeasibleBudgetError
from qcompress.engines.base import Engine
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.errors import EngineError, MissingError, VerificationError
from tests.engines.tiny import tiny, words
from tests.quick import slow_but

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
ENGINES = {
    "llama.cpp": (LlamaCpp(threads=1), qcompress.gguf_types(("Q4_0", "Q8_0"))),
    "compressed-tensors": (CompressedTensors(), qcompress.prune_quantize(bits=(4, 8), group_size=32)),
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return ENGINES[request.param][0]


@pytest.fixture
def model(tmp_path: Path) -> nn.Module:
    return tiny("llama", tmp_path / "model")


def compress(model: nn.Module, engine: Engine, folder: Path, budget: dict[str, Any], **changes: Any) -> Any:
    settings = {"options": ENGINES[engine.name][1], "method": "sampled", "solver": "greedy", **changes}
    return qcompress.compress(model, [words(0)], budget=budget, target=engine, output=folder / "small", **settings)


@contextlib.contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: the system refuses it in the midst of writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name != "model"]


@pytest.mark.parametrize("asked", slow_but([1000], [1000, "1%"]))
def test_a_budget_below_the_smallest_file_names_it_before_anything_is_measured(
    model: nn.Module, engine: Engine, tmp_path: Path, asked: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(InfeasibleBudgetError, match="smallest possible") as error:
        patched.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
        compress(model, engine, tmp_path, {"file_bytes": asked})
    stated = re.search(r"smallest possible use is ([\d,]+)", str(error.value))
    smallest = int(stated[1].replace(",", ""))
    result = compress(model, engine, tmp_path, {"file_bytes": smallest}, guard=False)
    assert result.exported.size_bytes == smallest


def test_bits_below_the_smallest_name_it_before_anything_is_measured(
    model: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(InfeasibleBudgetError, match="smallest possible") as error:
        patched.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
        compress(model, engine, tmp_path, {"bits_per_weight": 1})
    smallest = float(re.search(r"smallest possible use is ([\d.]+)", str(error.value))[1].rstrip("."))
    result = compress(model, engine, tmp_path, {"bits_per_weight": smallest * 1.001}, guard=False)
    assert result.report.usage["bits_per_weight"] == pytest.approx(smallest, rel=1e-4)


def test_a_folder_that_is_not_empty_or_where_a_file_would_be_is_refused_before_anything_is_measured(
    model: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    told = "small is not empty" if engine.writes_folder else "writes a file, but .*small is a folder"
    with pytest.raises(EngineError, match=told):
        compress(model, engine, tmp_path, {"file_bytes": "50%"})
    assert (tmp_path / "small" / "mine.txt").read_text() == "mine"
    (tmp_path / "small" / "mine.txt").unlink()
    if not engine.writes_folder:
        with pytest.raises(EngineError, match=told):
            compress(model, engine, tmp_path, {"file_bytes": "50%"})


def test_a_file_in_place_of_a_folder_is_refused_before_anything_is_measured(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").write_text("mine")
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(EngineError, match="writes a folder, but .* is a file"):
        compress(model, CompressedTensors(), tmp_path, {"file_bytes": "50%"})
    assert (tmp_path / "small").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*none"):
        compress(model, CompressedTensors(), tmp_path / "none", {"file_bytes": "50%"})


def test_the_smallest_file_for_a_loss_is_written_and_its_loss_measured(
    model: nn.Module, engine: Engine, tmp_path: Path
) -> None:
    result = compress(
        model, engine, tmp_path, {"loss": 1e-4}, minimize="file_bytes", pairs=False, solver="milp", time_limit=10
    )
    smallest, report = result.report.smallest, result.report
    assert report.loss_predicted <= 1e-4
    assert result.exported.size_bytes == report.usage["file_bytes"] == smallest["usage"] == smallest["at_least"]
    assert smallest["usage"] < report.original["file_bytes"]
    assert 0 < report.loss_measured < 1


@pytest.mark.parametrize("more", [{}, {"minimize": "file_bytes"}], ids=["file_bytes", "minimize"])
def test_options_that_the_engine_has_no_kernel_for(
    model: nn.Module, engine: Engine, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    budget = {"loss": 0.1} if more else {"file_bytes": "50%"}
    with pytest.raises(EngineError, match=f"engine '{engine.name}' runs none of the options on offer: .*rank"):
        compress(model, engine, tmp_path, budget, options=qcompress.low_rank(ratios=(0.5,)), **more)
    assert left(tmp_path) == []


def test_another_budget_out_of_reach_is_told_before_measuring_when_a_resource_is_minimized(
    model: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(InfeasibleBudgetError, match="no choice meets the budget for macs"):
        compress(model, engine, tmp_path, {"loss": 0.1, "macs": "1%"}, minimize="file_bytes")
    assert left(tmp_path) == []


def test_a_missing_package_is_told_before_anything_runs(
    model: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in engine.requires else there(name, *rest)
    )
    with pytest.raises(
        MissingError, match=rf"engine '{engine.name}' needs .*pip install 'qcompress\[{engine.extra}\]'"
    ):
        compress(model, engine, tmp_path, {"file_bytes": "50%"})
    with pytest.raises(MissingError, match="pip install"):
        qcompress.export(model, tmp_path / "small", target=engine)
    assert left(tmp_path) == []


@pytest.mark.parametrize("room", [0, 100, 30_000])
def test_a_disk_that_fills_up_leaves_nothing(model: nn.Module, engine: Engine, tmp_path: Path, room: int) -> None:
    with pytest.raises(OSError, match=r"small"), room_for(room):
        qcompress.export(model, tmp_path / "small", target=engine)
    assert left(tmp_path) == []


def test_a_file_that_was_there_outlives_a_disk_that_fills_up(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("before")
    with pytest.raises(OSError, match="small"), room_for(30_000):
        qcompress.export(model, tmp_path / "small", target="llama.cpp")
    assert (tmp_path / "small").read_text() == "before"


@pytest.mark.parametrize("made", slow_but([True], [True, False]))
def test_a_folder_that_is_rejected_is_kept_under_another_name(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: bool
) -> None:
    engine = CompressedTensors()
    if made:
        (tmp_path / "small").mkdir()
    with monkeypatch.context() as patched, pytest.raises(VerificationError, match="kept as .*small.rejected; nothing"):
        patched.setattr(CompressedTensors, "check", lambda *_: "its weights are wrong")
        compress(model, engine, tmp_path, {"file_bytes": "70%"}, guard=False)
    assert (tmp_path / "small.rejected" / "config.json").exists()
    assert (list((tmp_path / "small").iterdir()) == []) if made else not (tmp_path / "small").exists()
    assert compress(model, engine, tmp_path, {"file_bytes": "70%"}, guard=False).verification.ok
    assert sorted(left(tmp_path)) == ["small", "small.rejected"]


def test_an_encoder_whose_states_are_picked_by_forward_is_written_and_verified(engine: Engine, tmp_path: Path) -> None:
    encoder = tiny("bert", tmp_path / "model")
    result = compress(
        encoder, engine, tmp_path, {"bits_per_weight": 12}, loss="mse", guard=False,
        forward=lambda model, batch: model(batch).last_hidden_state,
    )  # fmt: skip
    assert result.verification.ok


def test_batches_that_only_forward_understands_are_refused_before_anything_is_measured(
    model: nn.Module, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(EngineError, match="An engine runs model.batch., without forward=") as error:
        qcompress.compress(
            model, [{"pages": words(0)}], budget={"bytes": "50%"}, target=engine, output=tmp_path / "small",
            forward=lambda model, batch: model(batch["pages"]).logits,
        )  # fmt: skip
    assert "pass forward=" not in str(error.value)
    assert left(tmp_path) == []


def test_a_model_that_is_refused_anyway_is_not_told_about_forward(engine: Engine) -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(EngineError) as error:
        qcompress.compress(
            network, [words(0)], budget={"bytes": "50%"}, target=engine, forward=lambda model, batch: model(batch),
        )  # fmt: skip
    assert "forward=" not in str(error.value)


def test_a_model_without_an_output_that_an_engine_gives_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    encoder = tiny("bert", tmp_path / "model", add_cross_attention=False)
    encoder.config.return_dict = False  # a tuple
    with pytest.raises(EngineError, match="the model returned tuple, .* without forward="):
        qcompress.compress(
            encoder, [words(0)], budget={"bytes": "50%"}, target=CompressedTensors(), output=tmp_path / "small",
            forward=lambda model, batch: model(batch)[0], loss="mse",
        )  # fmt: skip
