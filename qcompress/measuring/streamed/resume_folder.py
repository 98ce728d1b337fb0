"""The folder with the files of an unfinished measurement: whose they are, and what to do if they are damaged."""

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
def resume_folder(cache: AnyPath | None, key: str) -> Iterator[Path]:
    """Context manager with a folder for the measurement's files, which is removed at the end if there is no error.

    Args:
        cache: path of the folder; None for a temporary one.
        key: digest of everything that the files depend on.

    Raises:
        DataError: the path is that of a file, or of a folder with other files or those of another measurement; or a
            file in it is damaged or missing.
    """
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="qcompress.") as folder:
            yield Path(folder)
        return
    path = Path(cache)
    again = f"delete the folder {path} to measure from the start"
    if path.exists() and not path.is_dir():
        raise DataError(f"the cache of an opened model is a folder, and {path} is a file: choose another path")
    path.mkdir(parents=True, exist_ok=True)
    try:
        if (path / KEY).exists():
            found = KEY_KIND.read_json(path / KEY).get("key")
        elif others := [name for name in sorted(file.name for file in path.iterdir()) if not _unfinished(name)]:
            raise DataError(
                f"{path} holds {others[0]!r} but no {KEY}, so it is not the folder of an interrupted measurement: "
                f"choose a new folder; if it is one that has lost its {KEY}, {again}"
            )
        else:
            KEY_KIND.write_json(path / KEY, {"key": key})
            found = key
        if found != key:
            raise DataError(
                f"{path} holds the files of another measurement (model, data, options or seed differ); choose another "
                "cache or delete it"
            )
        yield path
    except FileFormatError as error:
        raise DataError(f"{error}; {again}") from error
    shutil.rmtree(path)


def _unfinished(name: str) -> bool:
    """Whether a file with this name was being written when a process was killed."""
    return name.startswith(".") and name.endswith(".part")
