"""Stamps of what a run wrote outside its folder: the next run replaces only files that have not changed since.

A stamp holds the size and the time of writing of every file. The stamp of a new file is recorded before the file is
moved into place, and that of the old file is kept until then. If the process dies in between, the next run knows
whichever it finds.
"""

from pathlib import Path
from typing import Any

Stamp = dict[str, list[int]]
"""File, relative to a folder or ``""`` for a single one → its bytes and nanoseconds of writing; zeros for a folder."""


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file, or of all files and folders in a folder; empty if there is nothing.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "a.txt").write_text("abc")
    3
    >>> [(name, size) for name, (size, _) in stamp_of(folder).items()]
    [('a.txt', 3)]
    """
    entries = [path] if path.is_file() else sorted(path.rglob("*"))
    names = {entry: "" if entry == path else entry.relative_to(path).as_posix() for entry in entries}
    stats = {entry: entry.lstat() for entry in entries}
    return {
        names[entry]: [0, 0] if entry.is_dir() and not entry.is_symlink() else [stat.st_size, stat.st_mtime_ns]
        for entry, stat in stats.items()
    }


def with_next(records: list[dict[str, Any]], goal: Path, draft: Path) -> list[dict[str, Any]]:
    """Add the record of a draft that is about to be moved to ``goal``."""
    return [*records, {"path": _name(goal), "files": stamp_of(draft)}]


def with_last(records: list[dict[str, Any]], goal: Path) -> list[dict[str, Any]]:
    """Drop the records of ``goal`` except the last, whose draft is now in place."""
    own = [record for record in records if record["path"] == _name(goal)]
    return [record for record in records if record["path"] != _name(goal)] + own[-1:]


def is_among(records: list[dict[str, Any]], goal: Path) -> bool:
    """Whether ``goal`` exists and matches one of its records."""
    return bool(stamp := stamp_of(goal)) and {"path": _name(goal), "files": stamp} in records


def records_in(journal: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records in a journal without damaged ones, so that nothing is replaced because of these."""
    found = journal.get("written")
    return [item for item in found if isinstance(item, dict) and "path" in item] if isinstance(found, list) else []


def _name(goal: Path) -> str:
    return str(goal.resolve())
