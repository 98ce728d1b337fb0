"""Files that settings of an engine ask for, such as llama.cpp's recipe: with the engine's own file, or not at all."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from torch import nn

import qcompress
from qcompress.budgets import FILE_BYTES
from qcompress.engines.base import Companion
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.verify import speedup_of
from qcompress.errors import EngineError, OptionsError, VerificationError
from qcompress.options import gguf_types
from tests.engines.tiny import tiny, words
from tests.engines.toy import Toy
from tests.models import seeded


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))


@dataclass(frozen=True, kw_only=True)
class Noting(Toy):
    """Keeps a note of the model beside its file."""

    note: str = ""
    source: str = ""

    def companions(self) -> Sequence[Companion]:
        given = [Path(self.note)] if self.note else []
        return [
            Companion(
                setting="note",
                path=path,
                content=lambda model: f"note of {sum(weight.numel() for weight in model.parameters())}".encode(),
                is_one=lambda content: not content or content.startswith(b"note"),
            )
            for path in given
        ]


NOTE = "note of 195"


@pytest.fixture
def data():
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr("qcompress.steps.measuring.measure", lambda *_, **__: pytest.fail("it was measured"))


def compress(engine, data, output):
    return qcompress.compress(network(), data, budget={FILE_BYTES: 0.7}, target=engine, output=output, guard=False)


def types_in(recipe: Path) -> dict[str, str]:
    """Tensor → type, as the recipe says."""
    lines = [line.partition("=") for line in recipe.read_text().splitlines()]
    return {name.strip("^$").replace("\\", ""): kind for name, _, kind in lines}


def types_of(file: Path) -> dict[str, str]:
    """Tensor → type, as the GGUF file has them."""
    tensors = gguf.GGUFReader(file).tensors
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in tensors if len(tensor.shape) > 1}


def test_the_recipe_of_compress_is_that_of_its_file_and_verify_leaves_it(tmp_path):
    model = tiny("llama", tmp_path / "model")
    engine = LlamaCpp(recipe=str(tmp_path / "types.txt"), threads=1)
    result = qcompress.compress(
        model, [{"input_ids": words(0)}], budget={FILE_BYTES: "60%"}, options=gguf_types(("Q4_0", "Q8_0")),
        method="sampled", loss="mse", forward=lambda model, batch: model(**batch)[0], target=engine,
        output=tmp_path / "small.gguf", guard=False,
    )  # fmt: skip
    told = types_in(tmp_path / "types.txt")
    assert told == types_of(tmp_path / "small.gguf")
    assert set(told.values()) & {"q4_0", "q8_0"}
    assert qcompress.verify(tmp_path / "small.gguf", result, [words(1)], target=engine).ok
    assert speedup_of(engine, model, result.model, [words(1)]) > 0
    assert types_in(tmp_path / "types.txt") == told
    (tmp_path / "types.txt").unlink()
    qcompress.export(result, tmp_path / "again.gguf", target=engine)
    assert types_in(tmp_path / "types.txt") == told


def test_a_recipe_never_replaces_the_file_it_is_about_or_another(tmp_path):
    model = tiny("llama", tmp_path / "model")
    source, output = tmp_path / "source.gguf", tmp_path / "small.gguf"
    qcompress.export(model, source, target="llama.cpp")
    before = source.read_bytes()
    for place, other in ((source, "source"), (output, "output")):
        engine = LlamaCpp(source=str(source), recipe=str(place))
        with pytest.raises(EngineError, match=f"recipe and {other} are the same file, .*name another file for recipe"):
            qcompress.export(model, output, target=engine)
    for other in (source, tmp_path / "model" / "config.json"):
        with pytest.raises(EngineError, match=r"recipe='.*' would replace a file of another kind; name a new file"):
            qcompress.export(model, output, target=LlamaCpp(recipe=str(other)))
    assert source.read_bytes() == before
    assert not output.exists()


def test_a_companion_is_written_with_the_file_and_replaces_one_of_its_kind(data, tmp_path):
    note, output = tmp_path / "note", tmp_path / "small.toy"
    for earlier in (None, "", "note of 7"):
        if earlier is not None:
            note.write_text(earlier)
        compress(Noting(factory=network, note=str(note)), data, output)
        assert note.read_text() == NOTE
        note.write_text("note of 7")
        qcompress.export(network(), output, target=Noting(note=str(note)))
        assert note.read_text() == NOTE
        note.unlink()
        output.unlink()


@pytest.mark.parametrize("earlier", [None, "note of 7"])
def test_a_file_that_is_rejected_or_cannot_be_written_leaves_companions_as_they_were(data, tmp_path, earlier):
    note, output = tmp_path / "note", tmp_path / "small.toy"
    if earlier is not None:
        note.write_text(earlier)
    with pytest.raises(VerificationError):
        compress(Noting(factory=network, note=str(note), wrong=1.0), data, output)
    with pytest.raises(EngineError, match="no Conv2d"):
        qcompress.export(nn.Conv2d(1, 1, 1), output, target=Noting(note=str(note)))
    assert not output.exists()
    assert (note.read_text() if note.exists() else None) == earlier
    assert {path.name for path in tmp_path.iterdir()} - {"note"} == {"small.toy.rejected"}


def test_the_same_file_by_another_name_is_found_out_before_measuring(data, tmp_path, unmeasured):
    output, link, twin = tmp_path / "small.toy", tmp_path / "link", tmp_path / "twin"
    output.write_bytes(b"")
    link.symlink_to(output)
    os.link(output, twin)
    for place in (output, tmp_path / "." / "small.toy", link, twin):
        with pytest.raises(EngineError, match="note and output are the same file"):
            compress(Noting(note=str(place)), data, output)
    with pytest.raises(EngineError, match="note and source are the same file"):
        compress(Noting(note=str(twin), source=str(output)), data, tmp_path / "other.toy")


def test_a_place_that_cannot_take_a_companion_is_refused_before_measuring(data, tmp_path, unmeasured):
    output, mine = tmp_path / "small.toy", tmp_path / "mine"
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere'"):
        compress(Noting(note=str(tmp_path / "nowhere" / "note")), data, output)
    (tmp_path / "link").symlink_to("nowhere/note")
    with pytest.raises(FileNotFoundError, match=r"there is no such folder: .*nowhere'"):
        compress(Noting(note=str(tmp_path / "link")), data, output)
    with pytest.raises(EngineError, match="note is a file, but .* is a folder"):
        compress(Noting(note=str(tmp_path)), data, output)
    mine.write_text("mine")
    with pytest.raises(EngineError, match=r"note='.*mine' would replace a file of another kind"):
        compress(Noting(note=str(mine)), data, output)
    assert mine.read_text() == "mine"


def test_a_companion_of_no_file_is_refused_before_measuring(data, tmp_path, unmeasured):
    with pytest.raises(OptionsError, match=r"note='.*note' is written together with the engine's file: give output"):
        compress(Noting(note=str(tmp_path / "note")), data, None)
