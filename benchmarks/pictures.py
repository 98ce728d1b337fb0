"""The pictures of the documentation, drawn as SVG from the rows that the benchmarks wrote.

`python -m benchmarks.pages` writes them anew together with the tables, and a test compares them with the rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from formulations.files import read_json

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 64, 150, 16, 48
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Values against another one, both on logarithmic axes; a line that rises by the same factor has slope 1.

    Attributes:
        sources: names of the files in ``benchmarks/published/`` with the rows.
        x: key of the value along the horizontal axis.
        lines: name of each line → its key.
        labels: names of both axes.
    """

    sources: tuple[str, ...]
    x: str
    lines: Mapping[str, str]
    labels: tuple[str, str]

    def svg(self, rows: Sequence[Mapping[str, float]]) -> str:
        """The rows as SVG."""
        rows = sorted(rows, key=lambda row: row[self.x])
        values = [row[key] for row in rows for key in self.lines.values()]
        across = _Axis([row[self.x] for row in rows], LEFT, WIDTH - RIGHT)
        up = _Axis(values, HEIGHT - BOTTOM, TOP)
        marks = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
        for place, text in across.ticks():
            marks += [_line((place, TOP), (place, HEIGHT - BOTTOM)), _text(place, HEIGHT - BOTTOM + 18, text)]
        for place, text in up.ticks():
            marks += [_line((LEFT, place), (WIDTH - RIGHT, place)), _text(LEFT - 8, place + 4, text, "end")]
        for (name, key), colour in zip(self.lines.items(), COLOURS, strict=False):
            points = [(across.place(row[self.x]), up.place(row[key])) for row in rows]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points]
            marks.append(_text(points[-1][0] + 10, points[-1][1] + 4, name, "start", colour))
        marks.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.labels[0]))
        middle = (HEIGHT - BOTTOM + TOP) / 2
        marks.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, self.labels[1])}</g>')
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">'
        return "\n".join([head, '<g font-family="sans-serif" font-size="13">', *marks, "</g>", "</svg>", ""])


PICTURES = {
    "streaming": Picture(
        sources=("streaming",),
        x="gb",
        lines={"measuring": "measure_s", "comparing": "verify_s", "applying": "apply_s", "writing": "export_s"},
        labels=("GB on disk", "seconds of processor time"),
    )
}


class _Axis:
    """A logarithmic axis in whole decades, from pixel ``first`` to ``last``."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        self._low = math.floor(math.log10(min(values)))
        self._high = max(math.ceil(math.log10(max(values))), self._low + 1)
        self._first, self._last = first, last

    def place(self, value: float) -> float:
        return self._first + (self._last - self._first) * (math.log10(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        return [(self.place(10.0**power), f"{10.0**power:g}") for power in range(self._low, self._high + 1)]


def _line(start: tuple[float, float], stop: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, stop
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ccc"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "black") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def drawn(name: str) -> str:
    """The picture of a name, as SVG."""
    picture = PICTURES[name]
    files = [ROOT / "benchmarks" / "published" / f"{source}.json" for source in picture.sources]
    return picture.svg([row for file in files for row in read_json(file, "rows of a benchmark")["rows"]])
