"""Tables of results, as JSON and Markdown."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formulations.files import read_json, replacing, write_json

PLACES = dict.fromkeys(("--data", "--model", "--out", "--output", "--folder", "--tree"), "FOLDER") | {"--text": "FILE"}
"""Flags that name a place on this machine, and what stands for it."""


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_results(folder: Path, name: str, values: Any, table: str) -> None:
    """Write ``name.json`` and ``name.md`` into ``folder``.

    Args:
        folder: folder for the files; created if missing.
        name: name of both files, without the ending.
        values: a mapping, or just the rows; the running command is added as ``command``.
        table: the rows as Markdown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / f"{name}.json", {"command": command(), **(values if isinstance(values, dict) else {"rows": values})}
    )
    with replacing(folder / f"{name}.md") as file:
        file.write((table + "\n").encode())


def command() -> str:
    """The command line of the running benchmark, with the documentation's placeholders for local paths.

    Where the results go is left out.

    >>> from unittest.mock import patch
    >>> with patch("sys.argv", ["/here/benchmarks/trust.py", "--data", "/there", "--samples", "64"]):
    ...     command()
    'python -m benchmarks.trust --data FOLDER --samples 64'
    """
    words = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    for place, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if equals and flag in PLACES:
            words[place] = f"{flag}={PLACES[flag]}"
        elif flag in PLACES and place + 1 < len(words):
            words[place + 1] = PLACES[flag]
    return " ".join(words).replace(" --out FOLDER", "").replace(" --out=FOLDER", "")


class Rows:
    """Rows in a JSON file, written one by one: an interrupted run with the same settings resumes.

    Args:
        file: the JSON file; it is replaced if it was written with other settings.
        settings: everything that the rows depend on, as plain JSON.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file, self._settings = file, json.loads(json.dumps(settings))
        written = read_json(file, "rows of a benchmark") if file.exists() else {}
        same = written.get("settings") == self._settings
        self._rows: list[dict[str, Any]] = written["rows"] if same else []
        if written:
            print(f"{file}: {f'goes on after {len(self._rows)} rows' if same else 'other settings, begins anew'}")

    @property
    def values(self) -> dict[str, Any]:
        """All rows written so far."""
        return {"settings": self._settings, "rows": self._rows}

    def of(self, **keys: Any) -> list[dict[str, Any]]:
        """All rows that have the given values."""
        return [row for row in self._rows if all(row.get(key) == value for key, value in keys.items())]

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to the file, and print it without its lists."""
        print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
        self._rows.append(row)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self.values)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
