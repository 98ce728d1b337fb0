"""What a killed process leaves behind goes with the next draft of the same name, and nothing else does."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from formulations.drafts import EARLIER, clear_left, draft, locked
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


FORKED = """
import multiprocessing, sys, time
from pathlib import Path
from formulations.drafts import locked
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
with locked(Path(sys.argv[1])):
    worker.start()
with locked(Path(sys.argv[1])) as again:
    print(again)
worker.kill()
"""

WRITERS = """
import multiprocessing, sys
from pathlib import Path
from formulations.files import replacing

def write_often(text):
    for _ in range(200):
        with replacing(Path(sys.argv[1])) as file:
            file.write(text.encode())

context = multiprocessing.get_context("fork")
writers = [context.Process(target=write_often, args=(text,)) for text in ("one", "two", "three")]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
print([writer.exitcode for writer in writers])
"""

ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from formulations.drafts import locked
with locked(Path(sys.argv[1])):
    if child := os.fork():
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    time.sleep(60)
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


def test_a_folder_that_was_set_aside_goes_back_before_it_is_replaced(tmp_path: Path) -> None:
    """The process was killed between moving the earlier folder away and moving the new one to its place."""
    left = tmp_path / ".small.0123456789ab.part"
    (left / EARLIER / "small").mkdir(parents=True)
    (left / EARLIER / "small" / "config.json").write_text("mine")
    with pytest.raises(ZeroDivisionError), drafting(tmp_path / "small", over_folder=True):
        raise ZeroDivisionError
    assert (tmp_path / "small" / "config.json").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("name", [EARLIER, "new", "small"])
def test_a_folder_of_any_name_is_replaced_with_all_that_is_in_it(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    (target / "kept" / "deep").mkdir(parents=True)
    (target / "kept" / "deep" / "file").write_text("earlier")
    (target / "kept").chmod(0o555)
    with drafting(target, over_folder=True) as whole:
        whole.mkdir()
        (whole / "file").write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert [file.name for file in target.iterdir()] == ["file"]


def test_a_pipe_with_the_name_of_a_draft_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".small.0123456789ab.part")
    with replacing(tmp_path / "small") as file:
        file.write(b"whole")
    assert (tmp_path / "small").read_text() == "whole"


@pytest.mark.parametrize("held", [True, False])
def test_a_draft_that_another_process_took_for_one_left_is_made_again(held: bool, tmp_path: Path) -> None:
    """The other one has removed it, or holds the lock and is about to."""
    made = []

    with contextlib.ExitStack() as other:

        def make(path: Path) -> None:
            made.append(path)
            if held or len(made) > 1:
                path.touch()
            if held and len(made) == 1:
                other.enter_context(locked(path))

        with draft(tmp_path / "small", make) as path:
            assert [path] == made[1:]
    assert not path.exists()


def printed(program: str, path: Path) -> str:
    """What a program prints; forks belong into a process without threads."""
    run = subprocess.run([sys.executable, "-c", program, str(path)], check=False, stdout=subprocess.PIPE, text=True)
    return run.stdout.strip()


def test_a_lock_ends_with_its_block_and_with_its_process_whatever_that_has_forked(tmp_path: Path) -> None:
    """Workers of a DataLoader are forked, and may live longer."""
    assert printed(FORKED, tmp_path) == "True"
    orphan = int(printed(ORPHAN, tmp_path))
    try:
        with locked(tmp_path) as again:
            assert again
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    assert printed(WRITERS, tmp_path / "small") == "[0, 0, 0]"
    assert [file.name for file in tmp_path.iterdir()] == ["small"]


def test_what_was_set_aside_for_a_name_that_only_begins_alike_stays(tmp_path: Path) -> None:
    first, second = (tmp_path / f"{'a name of more than forty characters, ' * 2}{end}" for end in ("1", "2"))
    left = tmp_path / f".{first.name[:40]}.0123456789ab.part"
    (left / EARLIER / first.name).mkdir(parents=True)
    with replacing(second) as file:
        file.write(b"whole")
    assert (left / EARLIER / first.name).is_dir()
    clear_left(first)
    assert first.is_dir()
    assert not left.exists()
    (left / EARLIER).mkdir(parents=True)  # the process was killed just before it set something aside
    clear_left(first)
    assert not left.exists()


def test_numbers_of_files_that_are_never_the_same_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network drives; the draft would be made again and again."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with replacing(tmp_path / "small") as file:
        file.write(b"whole")
    assert (tmp_path / "small").read_text() == "whole"
