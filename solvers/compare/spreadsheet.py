"""Format rows as comma-separated values, for spreadsheets and data frames."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Format rows under a line of headings; missing values are empty, nested values are JSON.

    Numbers are written so that they are read back exactly.

    >>> to_csv([{"solver": "dp", "objective": 0.1}, {"solver": "ga", "error": None, "options": {"rounds": 2}}])
    'solver,objective,error,options\ndp,0.1,,\nga,,,"{""rounds"": 2}"\n'
    """
    listed = list(rows)
    columns = list(dict.fromkeys(name for row in listed for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in listed)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=repr) if isinstance(value, Mapping) else value
