"""What a run wrote outside its folder: only a file or folder that is still as written may be replaced by the next run.

A stamp holds the size and the time of writing of every file. It is recorded before the draft takes its place, together
with that of what stands there until then, so that a process that dies in between leaves something that is known either
way.
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
    """Return the records with that of a draft which is about to take its place at ``goal``."""
    return [*records, {"path": _name(goal), "files": stamp_of(draft)}]


def with_last(records: list[dict[str, Any]], goal: Path) -> list[dict[str, Any]]:
    """Return the records with only the last one for ``goal``, which has taken its place."""
    own = [record for record in records if record["path"] == _name(goal)]
    return [record for record in records if record["path"] != _name(goal)] + own[-1:]


def is_among(records: list[dict[str, Any]], goal: Path) -> bool:
    """Whether something stands at ``goal`` that is still as one of the records says."""
    return bool(stamp := stamp_of(goal)) and {"path": _name(goal), "files": stamp} in records


def records_in(journal: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records in a journal; whatever is none is left out, so that nothing is replaced because of it."""
    found = journal.get("written")
    return [item for item in found if isinstance(item, dict) and "path" in item] if isinstance(found, list) else []


def _name(goal: Path) -> str:
    return str(goal.resolve())
