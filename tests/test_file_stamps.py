"""An engine's folder is replaced by the run that wrote it, and by nothing else."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import qcompress
from formulations.files import drafting
from qcompress.engines.base import EngineRun
from qcompress.errors import EngineError
from qcompress.run_folder import RunFolder, has_written
from tests.engines.toy import Toy


@dataclass(frozen=True, kw_only=True)
class InFolder(Toy):
    """The toy, with its file in a folder."""

    writes_folder: ClassVar[bool] = True

    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:
        path.mkdir()
        super().write(model, path / "rows", example)

    def run(self, path: Path, batches: Any) -> EngineRun:
        return super().run(path / "rows", batches)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


class Compress:
    """`compress` of one network for the engine, into ``out`` beside the run folder."""

    def __init__(self, place: Path) -> None:
        torch.manual_seed(0)
        self.model, self.data, self.place = network(), [torch.randn(32, 8)], place

    def __call__(self, share: float = 0.9, folder: str | None = "run") -> dict[str, bytes]:
        qcompress.compress(
            self.model,
            self.data,
            budget={"file_bytes": share},
            solver="greedy",
            guard=False,
            target=InFolder(factory=network),
            output=self.place / "out",
            folder=None if folder is None else self.place / folder,
        )
        return {file.name: file.read_bytes() for file in (self.place / "out").iterdir()}


@pytest.fixture
def compress(tmp_path: Path) -> Compress:
    return Compress(tmp_path)


def test_the_same_run_again_ends_with_the_same_folder_and_another_choice_replaces_it(compress: Compress) -> None:
    first = compress()
    assert compress() == first
    assert compress(0.6) != first
    assert compress() == first
    assert {item.name for item in compress.place.iterdir()} == {"run", "out"}


@pytest.mark.parametrize("moment", ["exporting", "exported"])
def test_a_run_that_was_killed_around_the_exchange_goes_on(
    compress: Compress, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it, the earlier folder stands there; after it, the new one: the journal knows both."""
    first = compress()

    def killed(self: RunFolder, *where: Path) -> None:
        original(self, *where) if moment == "exporting" else None
        raise KeyboardInterrupt

    original = getattr(RunFolder, moment)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            compress(0.6)
    assert compress() == first


def test_a_folder_of_others_or_one_that_was_changed_is_refused_and_left_alone(compress: Compress) -> None:
    def refused(folder: str | None = "run") -> None:
        with pytest.raises(EngineError, match=r"out is not empty; name a new .*\(--folder\) that it was written from"):
            compress(folder=folder)

    out = compress.place / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    refused()
    assert (out / "mine").read_text() == "mine"
    (out / "mine").unlink()
    compress()
    refused("another")
    refused(None)
    for changed in (out / "added", out / "rows"):
        changed.write_text("mine")
        refused()
        assert changed.read_text() == "mine"


@pytest.mark.parametrize("thing", ["folder", "link"])
def test_empty_folders_and_links_are_not_replaced_either(compress: Compress, thing: str) -> None:
    compress()
    added = compress.place / "out" / "added"
    added.mkdir() if thing == "folder" else added.symlink_to(compress.place / "run")
    with pytest.raises(EngineError, match="out is not empty"):
        compress(0.6)
    assert added.is_dir()


def test_what_comes_into_the_folder_during_the_run_is_left_there(
    compress: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress()
    run = InFolder.run

    def slow(self: InFolder, path: Path, batches: Any) -> EngineRun:
        (compress.place / "out" / "mine").write_text("mine")
        return run(self, path, batches)

    monkeypatch.setattr(InFolder, "run", slow)
    with pytest.raises(EngineError, match="out is not empty"):
        compress(0.6)
    assert (compress.place / "out" / "mine").read_text() == "mine"


def test_the_folder_keeps_its_mode(compress: Compress) -> None:
    compress()
    (compress.place / "out").chmod(0o700)
    compress(0.6)
    assert (compress.place / "out").stat().st_mode & 0o777 == 0o700


def test_records_that_are_none_allow_nothing(compress: Compress) -> None:
    compress()
    journal = compress.place / "run" / "run.json"
    for damaged in (None, 3, [3, {}], [{"path": str(compress.place / "out")}]):
        journal.write_text(json.dumps({**json.loads(journal.read_text()), "written": damaged}))
        assert not has_written(journal.parent, compress.place / "out")
        RunFolder(journal.parent).exported(compress.place / "other")


def test_a_folder_whose_successor_cannot_take_its_place_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier").write_text("earlier")
    with pytest.raises(FileNotFoundError), drafting(tmp_path / "out", over_folder=True):
        pass  # nothing was drafted
    assert [item.name for item in tmp_path.rglob("*")] == ["out", "earlier"]
