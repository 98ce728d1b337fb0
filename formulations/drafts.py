"""Unfinished files and folders, which move to their place once they are complete.

A process that is killed leaves its draft behind. Every draft is locked while it is written, and the next one of the
same name removes those without a lock. Locks end with their process, whatever processes it has forked; Windows and some
network drives have none, and there drafts are left alone.
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
"""Folder of a draft in which is, under its own name, what it is about to replace."""

_handles: set[int] = set()
"""Open files of the locks that this process holds."""


def _forget_handles() -> None:
    """Close the locks that a forked process shares with its parent, so that they end with the parent."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_handles)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder for the block.

    Yields:
        True if it is locked, False if somebody else holds the lock, None if there are no locks.

    Raises:
        FileNotFoundError: there is nothing at ``path``, or it was removed before it was locked.

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
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name would wait for a writer
    except PermissionError:
        yield None
        return
    _handles.add(handle)
    try:
        found: bool | None = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = False
        except OSError:
            found = None
        if not os.fstat(handle).st_nlink:  # removed, though another one may have its name by now
            raise FileNotFoundError(2, "it was removed before it was locked", str(path))
        path.stat()  # not compared with that of the handle: some network drives give another number every time
        yield found
    finally:
        if handle in _handles:  # else this is a forked process
            _handles.remove(handle)
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was just forked may not have closed its own yet
            os.close(handle)


@contextlib.contextmanager
def draft(target: Path, make: Callable[[Path], None], folder: Path | None = None) -> Iterator[Path]:
    """Yield a new path with a hidden name, which is removed after the block if it is still there.

    Args:
        target: what the draft is going to be.
        make: function that makes an empty file or folder.
        folder: where the draft is; None for beside ``target``.
    """
    beside = folder or target.parent
    while True:
        path = beside / f".{target.name[:40]}.{secrets.token_hex(6)}.part"
        make(path)
        with contextlib.ExitStack() as stack:
            try:
                ours = stack.enter_context(locked(path))
            except FileNotFoundError:
                continue
            if ours is False:
                continue  # it was taken for one that was left, before it was locked
            stack.callback(_remove, path)
            clear_left(target, beside)
            yield path
            return


def clear_left(target: Path, folder: Path | None = None) -> None:
    """Remove the drafts of processes that were killed; a folder that one had set aside goes back to its place.

    Args:
        target: what the drafts were going to be.
        folder: where they are; None for beside ``target``.
    """
    pattern = re.compile(rf"\.{re.escape(target.name[:40])}\.[0-9a-f]{{12}}\.part")
    left: list[Path] = []
    with contextlib.suppress(OSError):  # it cannot be read
        left = [path for path in (folder or target.parent).iterdir() if pattern.fullmatch(path.name)]
    for path in left:
        with contextlib.suppress(OSError), locked(path) as ours:  # others may remove it, or it belongs to somebody else
            aside = path / EARLIER / target.name
            others = (path / EARLIER).is_dir() and any(kept != aside for kept in (path / EARLIER).iterdir())
            if not ours or others:
                continue  # it is in use, or keeps something whose name only begins like this one
            if aside.exists() and not os.path.lexists(target):
                aside.rename(target)
            _remove(path)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    path.chmod(0o700)
    for folder, inner, _ in os.walk(path):  # what cannot be written to cannot be emptied
        for name in inner:
            if not Path(folder, name).is_symlink():
                Path(folder, name).chmod(0o700)
    shutil.rmtree(path)
