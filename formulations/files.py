"""Write files atomically, and read and write JSON; `formulations.file_kinds` defines the content of the files."""

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from formulations.drafts import EARLIER, draft
from formulations.errors import FileFormatError

AnyPath = str | os.PathLike[str]

_MOST_LINKS = 40  # maximum length of a chain of symbolic links, as in Linux


def as_path(path: AnyPath) -> Path:
    """Return a path as such.

    Raises:
        FileFormatError: ``path`` is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise FileFormatError(f"a file is named by its path (text or pathlib.Path), found {path!r}")
    return Path(path)


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a new file that replaces ``path`` only if the block ends without an error.

    Every file of the project is written through this function or `drafting`. If ``path`` is a symbolic link, the link
    stays and its target is replaced. An existing file keeps its mode. Special files (a pipe, a device, anything below
    ``/proc``) are not replaced: the content is written into them when it is complete.

    Raises:
        OSError: the file cannot be written (a full disk, a read-only file or folder, a missing folder). The error
            names ``path``, and an existing file is left unchanged.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "note.txt") as file:
    ...     _ = file.write(b"whole")
    >>> (folder / "note.txt").read_text()
    'whole'
    """
    target = Path(os.path.realpath(as_path(path)))
    _require_end_of_link(path)
    try:
        with _written_into(path) if _is_special(path) else _replaced(target) as file:
            yield file
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def missing_folder(path: AnyPath) -> Path | None:
    """Return the folder that ``path``, or the file that a link there leads to, would be in, if it does not exist.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "link").symlink_to("nowhere/file")
    >>> missing_folder(folder / "link").name
    'nowhere'
    >>> missing_folder(folder / "file") is None
    True
    """
    folders = (Path(path).parent, Path(os.path.realpath(path)).parent)
    return next((folder for folder in folders if not folder.is_dir()), None)


@contextlib.contextmanager
def drafting(path: AnyPath, *, over_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that moves to ``path`` only if the block ends without an error.

    This is for other libraries that write to a path; the rules are those of `replacing`. A file replaces no folder, and
    a folder only an empty folder or a path that does not exist; with ``over_folder``, any folder: it is set aside, and
    restored if the new one cannot be moved into place.

    Raises:
        OSError: same as in `replacing`.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with drafting(folder / "note.txt") as path:
    ...     _ = path.write_text("whole")
    >>> (folder / "note.txt").read_text()
    'whole'
    """
    target, special = Path(os.path.realpath(path)), _is_special(path) and not Path(path).is_dir()
    _require_end_of_link(path)
    try:
        if not special and target.is_file() and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))
        with draft(target, partial(Path.mkdir, mode=0o700), Path(tempfile.gettempdir()) if special else None) as folder:
            whole = folder / "new" / target.name  # in a separate folder on the same disk, so that moving is atomic
            whole.parent.mkdir()
            yield whole
            if special:
                with _written_into(path) as file, whole.open("rb") as content:
                    shutil.copyfileobj(content, file)
                return
            if target.is_dir():
                if whole.is_file():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))
                _exchange(whole, target, folder / EARLIER / target.name, over_folder=over_folder)
                return
            if target.exists():
                whole.chmod(stat.S_IMODE(target.stat().st_mode))
            whole.replace(target)
    except OSError as error:
        paths = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]  # two of a copy
        if error.errno is None or (paths and not any(part.endswith(".part") for path in paths for part in path.parts)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def _exchange(whole: Path, target: Path, aside: Path, *, over_folder: bool) -> None:
    """Move a draft to a folder's place, which is empty unless ``over_folder``."""
    if over_folder:
        whole.chmod(stat.S_IMODE(target.stat().st_mode))
        aside.parent.mkdir()
        target.rename(aside)
    else:
        target.rmdir()
    try:
        whole.replace(target)
    except BaseException:
        if over_folder:
            aside.rename(target)
        raise


def _require_end_of_link(path: AnyPath) -> None:
    """Raise an error about the folder that is missing if ``path`` is a link into one, instead of about the link."""
    if Path(path).is_symlink() and (folder := missing_folder(path)) is not None:
        raise FileNotFoundError(errno.ENOENT, f"{path} is a link into a folder that does not exist", str(folder))


def _is_special(path: AnyPath) -> bool:
    """Whether ``path`` leads to a special file, which must not be replaced by a regular file."""
    hop = Path(path)
    for _ in range(_MOST_LINKS):
        if hop.parent.resolve().is_relative_to("/proc"):  # /dev/stdout is a link into /proc
            return True
        if not hop.is_symlink():
            return hop.exists() and not hop.is_file()
        hop = hop.parent / hop.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


@contextlib.contextmanager
def _written_into(path: AnyPath) -> Iterator[IO[bytes]]:
    content = io.BytesIO()
    yield content
    with Path(path).open("ab") as file:  # append, to keep what a shell already redirected into the file
        file.write(content.getbuffer())


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[IO[bytes]]:
    if target.exists() and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))

    def make(unfinished: Path) -> None:
        try:  # with the mode that the umask leaves
            unfinished.touch(exist_ok=False)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(target)) from error

    with draft(target, make) as unfinished:
        with unfinished.open("wb") as file:
            if target.exists():
                unfinished.chmod(stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)


def plain(value: Any) -> Any:
    """Return a value with NumPy's numbers and arrays as Python's; everything else is unchanged.

    >>> import numpy as np
    >>> plain({"sweeps": np.int64(30), "schedule": np.array([0.1, 5.0])})
    {'sweeps': 30, 'schedule': [0.1, 5.0]}
    """
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def write_json(path: AnyPath, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused with a ValueError."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: AnyPath, kind: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileFormatError: the file does not hold a JSON object.
    """
    try:
        value = json.loads(as_path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not a {kind} file: no readable JSON in it ({error})") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} is not a {kind} file: expected a JSON object, found {type(value).__name__}")
    return value
