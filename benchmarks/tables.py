"""Tables of results, as JSON and Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formulations.files import replacing, write_json


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; ``columns`` maps keys to headings."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def write_results(folder: Path, name: str, values: Any, table: str) -> None:
    """Write ``name.json`` and ``name.md`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", values)
    with replacing(folder / f"{name}.md") as file:
        file.write((table + "\n").encode())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
