"""An append-only file of results that cost time to get, so that interrupted work resumes.

One JSON line a result, ``{"kind", "version", "key", "value"}``: the key says what was asked, the value what came out.
What always holds: a line is written in one piece and reaches the disk before `Journal.add` returns; a last line
that was cut half-way is dropped and asked for again; a line that is damaged otherwise is an error, never skipped.
"""

import json
import os
from pathlib import Path
from typing import Any

from formulations import FileFormatError, Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from solvers.base import Solver
from solvers.provenance import class_names, versions

FILE_KIND = FileKind("qcompress journal", version=1)

_BEGIN = json.dumps({"kind": FILE_KIND.name})[:-1].encode()  # how every line of ours begins


class Journal:
    """The results in a journal file; a new file is made where there is none.

    Args:
        path: of the file, in a folder that exists.

    Raises:
        FileFormatError: the file is no journal, of a newer version, or damaged.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.jsonl"
    >>> Journal(path).add({"seed": 1}, "result")
    >>> Journal(path).get({"seed": 1}), Journal(path).get({"seed": 2})
    ('result', None)
    """

    def __init__(self, path: AnyPath) -> None:
        self._path = Path(path)
        content = self._path.read_bytes() if self._path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        self._values = dict(self._read(number, line) for number, line in enumerate(complete.splitlines(), start=1))
        half = content[len(complete) :]
        if not (half.startswith(_BEGIN) or _BEGIN.startswith(half)):
            raise FileFormatError(f"{path} is not a {FILE_KIND.name} file: its last line is {half[:40]!r}")
        with self._path.open("ab") as file:  # also finds out at once whether it can be written
            file.truncate(len(complete))

    def get(self, key: dict[str, Any]) -> Any | None:
        """Look up the value that was added for this key, or None."""
        return self._values.get(_canonical(key))

    def add(self, key: dict[str, Any], value: Any) -> None:
        """Append a value (JSON-able) for a key. Not-a-number is refused (ValueError)."""
        entry = {**FILE_KIND.header, "key": key, "value": value}
        line = json.dumps(entry, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self._values[_canonical(key)] = json.loads(line)["value"]

    def _read(self, number: int, line: bytes) -> tuple[str, Any]:
        where = f"{self._path}, line {number},"
        with FILE_KIND.building(where):
            entry = json.loads(line)
            FILE_KIND.require(entry, where)
            return _canonical(entry["key"]), entry["value"]


def run_key(
    purpose: str, problem: Problem, solver: Solver, time_limit: float | None, seed: int | None
) -> dict[str, Any]:
    """The key of one solver run: everything that decides what comes out, versions of the code included.

    A dimod sampler is known by its class, those it is composed of, and its parameters; what else it was made with does
    not show, so that two which differ in that need labels of their own.
    """
    return {
        "purpose": purpose,
        "problem": problem.fingerprint(),
        "solver": solver.name,
        "classes": class_names(solver),
        "versions": versions(solver),
        "options": {name: repr(value) for name, value in solver.option_values.items()},
        "time_limit": time_limit,
        "seed": seed,
    }


def _canonical(key: Any) -> str:
    return json.dumps(key, sort_keys=True)
