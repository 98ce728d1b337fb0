"""Files that are replaced whole or not at all, and JSON in them; what they hold is in `formulations.file_kinds`."""

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from formulations.errors import FileFormatError

AnyPath = str | os.PathLike[str]

_MOST_LINKS = 40  # that lead to each other, as Linux has it


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of ``path`` only when the block ends without an error.

    Every file of the project is written through this function or `drafting`. A link stays a link: the file that it
    leads to is replaced. An existing file keeps its mode. What is no regular file (a pipe, a device, anything below
    ``/proc``) is written into once the whole content is there.

    Raises:
        OSError: the file cannot be written (a full disk, a read-only file or folder, a folder that is missing); it
            names ``path``, and what was there is as it was.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with replacing(folder / "note.txt") as file:
    ...     _ = file.write(b"whole")
    >>> (folder / "note.txt").read_text()
    'whole'
    """
    target = Path(os.path.realpath(path))
    try:
        with _written_into(path) if _is_special(path) else _replaced(target) as file:
            yield file
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


@contextlib.contextmanager
def drafting(path: AnyPath) -> Iterator[Path]:
    """Give a temporary place for a file or a folder, which moves to ``path`` only when the block ends without an error.

    For files that other libraries write, which take a path; the rules are those of `replacing`. A folder takes the
    place of an empty one, or of none.

    Raises:
        OSError: as for `replacing`.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with drafting(folder / "note.txt") as draft:
    ...     _ = draft.write_text("whole")
    >>> (folder / "note.txt").read_text()
    'whole'
    """
    target, special = Path(os.path.realpath(path)), _is_special(path) and not Path(path).is_dir()
    beside = None if special else target.parent
    try:
        if not special and target.is_file() and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))
        with tempfile.TemporaryDirectory(dir=beside, prefix=f".{target.name[:40]}.", suffix=".part") as folder:
            draft = Path(folder) / target.name  # in a folder of its own on the same disk, so that it moves at once
            yield draft
            if special:
                with _written_into(path) as file, draft.open("rb") as content:
                    shutil.copyfileobj(content, file)
                return
            if target.is_dir():
                target.rmdir()
            elif target.exists():
                draft.chmod(stat.S_IMODE(target.stat().st_mode))
            draft.replace(target)
    except OSError as error:
        named = () if error.filename is None else Path(str(error.filename)).parts
        if error.errno is None or (named and not any(name.endswith(".part") for name in named)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error


def _is_special(path: AnyPath) -> bool:
    """Whether ``path`` leads to something that a regular file must not take the place of."""
    hop = Path(path)
    for _ in range(_MOST_LINKS):
        if hop.parent.resolve().is_relative_to("/proc"):  # /dev/stdout is a link to there, whatever it leads to
            return True
        if not hop.is_symlink():
            return hop.exists() and not hop.is_file()
        hop = hop.parent / hop.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


@contextlib.contextmanager
def _written_into(path: AnyPath) -> Iterator[IO[bytes]]:
    content = io.BytesIO()
    yield content
    with Path(path).open("ab") as file:  # a shell's redirection keeps what else went to standard output
        file.write(content.getbuffer())


@contextlib.contextmanager
def _replaced(target: Path) -> Iterator[IO[bytes]]:
    if target.exists() and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(target))
    unfinished = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.part")
    try:  # os.open applies the umask by itself; to read it, it would have to be set for all threads
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            if target.exists():
                unfinished.chmod(stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: AnyPath, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Not-a-number is refused (ValueError)."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: AnyPath, kind: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileFormatError: the file does not hold a JSON object.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not a {kind} file: no readable JSON in it ({error})") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} is not a {kind} file: expected a JSON object, found {type(value).__name__}")
    return value
