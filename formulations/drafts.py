"""Unfinished files and folders, which move to their place once they are complete.

A process that is killed leaves its draft behind. Every draft is locked while it is written, and the next one of the
same name removes those without a lock. Locks end with their process; Windows and some network drives have none, and
there drafts are left alone.
"""

import contextlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

EARLIER = "earlier"
"""Name of a folder set aside in a draft, which is not removed with it."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder for the block.

    Yields:
        True if it is locked, False if somebody else holds the lock, None if there are no locks.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with locked(folder), locked(folder) as second:
    ...     second in (False, None)
    True
    """
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        yield None
        return
    try:
        found: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = False
        except OSError:
            found = None
        yield found
    finally:
        os.close(handle)


@contextlib.contextmanager
def draft(target: Path, make: Callable[[Path], None], folder: Path | None = None) -> Iterator[Path]:
    """Yield a new path with a hidden name, which is removed after the block if it is still there.

    Args:
        target: what the draft is going to be.
        make: function that makes an empty file or folder.
        folder: where the draft is; None for beside ``target``.
    """
    beside, name = folder or target.parent, target.name[:40]
    while True:
        path = beside / f".{name}.{secrets.token_hex(6)}.part"
        make(path)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path))
                path.stat()
            except FileNotFoundError:  # taken for one that was left before it was locked
                continue
            _remove_left(beside, name)
            try:
                yield path
            finally:
                _remove(path)
            return


def _remove_left(folder: Path, name: str) -> None:
    """Remove the drafts of processes that were killed."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.part")
    with contextlib.suppress(OSError):  # others may remove it as well, or it may not be ours
        for path in [path for path in folder.iterdir() if pattern.fullmatch(path.name)]:
            with locked(path) as alone:
                if alone and not (path / EARLIER).exists():
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # what is left goes with the next one
    else:
        path.unlink(missing_ok=True)
