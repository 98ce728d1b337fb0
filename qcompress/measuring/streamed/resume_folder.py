"""Folders with files that a later call resumes from: what they belong to, and what to do if they are damaged."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from formulations.errors import FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.errors import DataError

KEY, KEY_KIND = "key.json", FileKind("qcompress streamed measurement", version=1)


@contextlib.contextmanager
def resume_folder(cache: AnyPath | None, key: str, *, keep: bool = False) -> Iterator[Path]:
    """Yield a folder for the measurement's files; remove it on exit unless there was an error.

    Args:
        cache: path of the folder; None for a temporary one.
        key: digest of everything that the files depend on.
        keep: whether the caller removes it, when it has stored what was made from the files.

    Raises:
        DataError: the path is a file, or a folder with other files or those of another measurement; or a file in it is
            damaged or missing.
    """
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="qcompress.") as folder:
            yield Path(folder)
        return
    path = Path(cache)
    claim(path, KEY_KIND, key, "the files of another measurement (model, data, options or seed differ)")
    try:
        yield path
    except FileFormatError as error:
        raise DataError(f"{error}; delete the folder {path} to start again") from error
    if not keep:
        remove_files(path)


def remove_files(path: Path) -> None:
    """Remove a folder that is not needed any more.

    It is renamed first, because a folder of which a part is left could not be resumed from.
    """
    done = _done(path)
    shutil.rmtree(done, ignore_errors=True)
    try:
        path.replace(done)
    except OSError:  # a mount point, for example
        done = path
    shutil.rmtree(done, ignore_errors=True)


def _done(path: Path) -> Path:
    return path.with_name(f".{path.name}.done")


def claim(path: Path, kind: FileKind, key: str, others: str) -> None:
    """Create a folder for files that belong to a key, or check that an existing one belongs to it.

    Args:
        path: path of the folder.
        kind: kind of the file in it that holds the key.
        key: digest of everything that the files depend on.
        others: what a folder with another key holds, for the error.

    Raises:
        DataError: the path is a file, or a folder with other files.
    """
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} must be a folder for the files of an opened model, and is a file: choose another path")
    shutil.rmtree(_done(path), ignore_errors=True)  # of a call that was killed while it removed its files
    path.mkdir(parents=True, exist_ok=True)
    if not (path / KEY).exists():
        if kept := [name for name in sorted(file.name for file in path.iterdir()) if not _unfinished(name)]:
            raise DataError(
                f"{path} holds {kept[0]!r} but no {KEY} that says what it belongs to: choose a new folder; if it is "
                f"one that has lost its {KEY}, delete it"
            )
        kind.write_json(path / KEY, {"key": key})
    try:
        found = kind.read_json(path / KEY).get("key")
    except FileFormatError as error:
        raise DataError(f"{error}; delete the folder {path} to start again") from error
    if found != key:
        raise DataError(f"{path} holds {others}; choose another folder or delete it")


def _unfinished(name: str) -> bool:
    """Whether a file with this name was being written when a process was killed."""
    return name.startswith(".") and name.endswith(".part")
