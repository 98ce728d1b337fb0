"""An append-only file of expensive results, so that interrupted work can resume.

Each result is one JSON line, ``{"kind", "version", "key", "value"}``: the key describes the task, the value is its
result. A line is written in one piece and is on disk before `Journal.add` returns. A truncated last line is dropped, so
that its task runs again. A line that is damaged in any other way is an error and never skipped.
"""

import json
import os
from pathlib import Path
from typing import Any

from formulations import FileFormatError, Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath, plain
from solvers.base import Solver
from solvers.provenance import class_names, versions

FILE_KIND = FileKind("qcompress journal", version=1)

_BEGIN = json.dumps({"kind": FILE_KIND.name})[:-1].encode()  # prefix of every line


class Journal:
    """The results in a journal file, which is created if it does not exist.

    Args:
        path: path of the file; its folder must exist.

    Raises:
        FileFormatError: the file is not a journal, has another version, or is damaged.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.jsonl"
    >>> Journal(path).add({"seed": 1}, "result")
    >>> Journal(path).get({"seed": 1}), Journal(path).get({"seed": 2})
    ('result', None)
    """

    def __init__(self, path: AnyPath) -> None:
        self._path = Path(path)
        content = self._path.read_bytes() if self._path.exists() else b""
        entries, complete = _complete_lines(self._path, content)
        self._values = {_canonical(key): value for key, value in entries}
        with self._path.open("ab") as file:  # also checks that the file can be written
            file.truncate(complete)

    def get(self, key: dict[str, Any]) -> Any | None:
        """Look up the value that was added for this key, or None."""
        return self._values.get(_canonical(key))

    def add(self, key: dict[str, Any], value: Any) -> None:
        """Append a value, which JSON must be able to store, for a key. NaN is refused with a ValueError."""
        entry = {**FILE_KIND.header, "key": key, "value": value}
        line = json.dumps(entry, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self._values[_canonical(key)] = json.loads(line)["value"]


def read_journal(path: AnyPath) -> list[tuple[dict[str, Any], Any]]:
    """Return the keys and values in a journal file, which may still be written to; a truncated last line is left out.

    Raises:
        FileNotFoundError: the file does not exist.
        FileFormatError: the file is not a journal, has another version, or is damaged.
    """
    return _complete_lines(Path(path), Path(path).read_bytes())[0]


def run_key(
    purpose: str, problem: Problem, solver: Solver, time_limit: float | None, seed: int | None
) -> dict[str, Any]:
    """Return the key of one solver run: everything that determines the result, including versions of the code.

    A dimod sampler is identified by its class, the classes it is composed of, and its parameters. Samplers that differ
    in other ways need different labels.
    """
    return {
        "purpose": purpose,
        "problem": problem.fingerprint(),
        "solver": solver.name,
        "classes": class_names(solver),
        "versions": versions(solver),
        "options": {name: repr(plain(value)) for name, value in solver.option_values.items()},  # arrays in full
        "time_limit": None if time_limit is None else float(time_limit),  # 1 and 1.0 are the same
        "seed": plain(seed),
    }


def _complete_lines(path: Path, content: bytes) -> tuple[list[tuple[dict[str, Any], Any]], int]:
    """Return the keys and values of the complete lines, and the number of bytes of these lines."""
    complete = content[: content.rfind(b"\n") + 1]
    half = content[len(complete) :]
    if not (half.startswith(_BEGIN) or _BEGIN.startswith(half)):
        raise FileFormatError(f"{path} is not a {FILE_KIND.name} file: its last line is {half[:40]!r}")
    entries = [_entry(line, f"{path}, line {number},") for number, line in enumerate(complete.splitlines(), start=1)]
    return entries, len(complete)


def _entry(line: bytes, where: str) -> tuple[dict[str, Any], Any]:
    with FILE_KIND.building(where):
        entry = json.loads(line)
        FILE_KIND.require(entry, where)
        return entry["key"], entry["value"]


def _canonical(key: Any) -> str:
    return json.dumps(key, sort_keys=True)
