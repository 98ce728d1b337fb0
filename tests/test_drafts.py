"""What a killed process leaves behind goes with the next draft of the same name, and nothing else does."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from formulations.drafts import EARLIER, draft
from formulations.files import drafting, replacing

KILLED = """
import os, signal, sys
from pathlib import Path
from formulations.files import drafting, replacing
path = Path(sys.argv[1])
if sys.argv[2] == "file":
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
else:
    with drafting(path) as draft:
        draft.mkdir()
        (draft / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_a_draft_that_the_next_one_removes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "small"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".small.")
    with drafting(path) as whole:
        whole.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
    assert path.read_text() == "whole"


def test_drafts_in_progress_and_files_of_other_names_stay(tmp_path: Path) -> None:
    others = [
        ".small.0123456789ab.part.txt",
        ".small.xyz.part",
        ".smaller.0123456789ab.part",
        "small.0123456789ab.part",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    with replacing(tmp_path / "small") as first:
        first.write(b"first")
        with drafting(tmp_path / "small") as second:
            second.write_text("second")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "small"])
    assert (tmp_path / "small").read_text() == "first"


def test_a_folder_that_was_set_aside_is_not_removed(tmp_path: Path) -> None:
    left = tmp_path / ".small.0123456789ab.part"
    (left / EARLIER).mkdir(parents=True)
    (left / EARLIER / "config.json").write_text("mine")
    with replacing(tmp_path / "small") as file:
        file.write(b"whole")
    assert (left / EARLIER / "config.json").read_text() == "mine"


def test_a_draft_that_another_process_took_for_one_left_is_made_again(tmp_path: Path) -> None:
    made = []

    def make(path: Path) -> None:
        made.append(path)
        if len(made) > 1:
            path.touch()

    with draft(tmp_path / "small", make) as path:
        assert [path] == made[1:]
    assert not list(tmp_path.iterdir())


def write_often(path: Path, text: str) -> None:
    for _ in range(200):
        with replacing(path) as file:
            file.write(text.encode())


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "small", text)) for text in ("one", "two", "three")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["small"]
