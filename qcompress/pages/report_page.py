"""``report.html``: a compression run as one self-contained page.

The drawing library (Plotly, the extra ``report``) is embedded in the file, so that the page opens without a network.
The page contains the data of the figures as JSON, and the numbers can be saved as JSON and CSV. Colours follow the
reader's light or dark setting, and printing shows every section.
"""

import base64
import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from formulations.files import AnyPath, replacing
from formulations.formatting import amount, number, with_error
from qcompress.agreement import Agreement
from qcompress.errors import MissingError
from qcompress.pages import figures
from qcompress.report import Report, by_reason
from solvers import Solution
from solvers.sweep import Sweep

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #ffffff; --soft: #60646c; --line: #d9dce1; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #16181c; --soft: #a4a9b1; --line: #363a41; --warn: #423715; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 1rem 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.note, .source { color: var(--soft); margin: .2rem 0 .6rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.3rem; } .tile span { color: var(--soft); font-size: .85rem; }
.warning { background: var(--warn); border-left: 4px solid #E69F00; padding: .6rem .8rem; margin: .6rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.words, th.words { text-align: left; white-space: normal; }
a { color: inherit; } .figure { width: 100%; }
@media print { body { max-width: none; } .figure { break-inside: avoid; } nav { display: none; } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  const axis = name => ({...layout[name], gridcolor: line, zerolinecolor: line, linecolor: line});
  return {...layout, font: {color: ink}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
          xaxis: axis("xaxis"), yaxis: axis("yaxis")};
}
function draw() {
  for (const [name, figure] of Object.entries(figures))
    Plotly.react(name, figure.data, themed(figure.layout), {responsive: true, displaylogo: false});
}
draw();
dark.addEventListener("change", draw);
"""


def write_report_page(run: AnyPath, path: AnyPath | None = None, *, sweep: Sweep | None = None) -> Path:
    """Write the report page for a run folder of `compress`.

    Args:
        run: the run folder. It must contain ``report.json``; ``solution.json`` and ``agreement.json`` add sections.
        path: path of the page; by default ``report.html`` in the folder.
        sweep: a Pareto curve of the same problem, which adds a section.

    Raises:
        FileNotFoundError: the folder has no report.
        MissingError: Plotly is not installed.
    """
    folder = Path(run)
    report = Report.load(folder / "report.json")
    solution = Solution.load(folder / "solution.json") if (folder / "solution.json").exists() else None
    agreement = Agreement.load(folder / "agreement.json") if (folder / "agreement.json").exists() else None
    target = folder / "report.html" if path is None else Path(path)
    text = report_page(report, title=folder.resolve().name, solution=solution, agreement=agreement, sweep=sweep)
    with replacing(target) as file:
        file.write(text.encode())
    return target


def report_page(
    report: Report,
    *,
    title: str = "Compression",
    solution: Solution | None = None,
    agreement: Agreement | None = None,
    sweep: Sweep | None = None,
) -> str:
    """Return the page as HTML; sections without data are omitted.

    Raises:
        MissingError: Plotly is not installed.
    """
    script = _plotly()
    drawn: dict[str, Any] = {}

    def section(name: str, heading: str, note: str, figure: figures.Figure | None) -> str:
        if figure is None:
            return ""
        drawn[name] = figure
        return f'<h2>{heading}</h2><p class="note">{note}</p><div class="figure" id="{name}"></div>'

    body = [
        f"<h1>{html.escape(title)}</h1>",
        *(f'<p class="warning"><b>Warning:</b> {html.escape(text)}</p>' for text in report.warnings),
        _tiles(report),
        _resources(report),
        _notes(report),
        section(
            "candidates", "Predicted against measured",
            "All candidates evaluated on the held-out samples; the star was taken. On the dotted line, prediction and "
            "measurement agree.", figures.candidates(report),
        ),
        section("bytes", "Bytes by part", "Before and after.", figures.bytes_by_part(report)),
        section("loss", "Loss of every part's choice", "Predicted, for each choice alone.",
                figures.loss_by_part(report)),
        "" if solution is None else section(
            "race", "The solver over time",
            "The optimum of the prediction lies between the two lines.", figures.race(solution)),
        "" if sweep is None else section(
            "front", "Other budgets", "The least predicted loss at every budget, and its proven bound. Where the axis "
            "is logarithmic, losses and bounds of zero are left out.", figures.front(sweep)),
        "" if agreement is None else _changes(agreement, section),
        _parts(report),
        _skipped(report),
        _downloads(report),
    ]  # fmt: skip
    numbers = json.dumps(drawn, allow_nan=False).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}"
        f'<script type="application/json" id="figures">{numbers}</script>'
        f"<script>{script}</script><script>{SCRIPT}</script></body></html>"
    )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingError("the report page needs Plotly: pip install 'qcompress[report]'") from error
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _tiles(report: Report) -> str:
    used, original = report.usage["bytes"], report.original["bytes"]
    seen = report.loss_validation
    held_out = "–" if seen is None else with_error(seen, report.loss_validation_error)
    tiles = [
        (f"{original / used:.2f} ×" if used else "–", f"smaller: {used:,.0f} of {original:,.0f} bytes"),
        (f"{report.loss_predicted:.4g}", f"loss predicted ({report.loss})"),
        (held_out, "loss on held-out samples"),
        (number(report.loss_measured, 4), "loss on the calibration data"),
        ("–" if report.gap is None else f"{100 * report.gap:.3g} %", f"gap of the prediction: {report.status}"),
    ]
    if report.metric_before is not None and report.metric_after is not None:
        tiles.append((f"{report.metric_after:.4g}", f"{report.metric_name}, {report.metric_before:.4g} before"))
    cells = (f'<div class="tile"><b>{value}</b><span>{html.escape(label)}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _resources(report: Report) -> str:
    rows = [
        (
            name,
            amount(report.original[name]),
            "–" if name not in report.budgets else amount(report.budgets[name]),
            amount(used),
        )
        for name, used in report.usage.items()
    ]
    note = f'<p class="note">{html.escape(report.coverage)}</p>' if report.coverage else ""
    return _table(("resource", "original", "budget", "compressed"), rows) + note


def _changes(agreement: Agreement, section: Callable[[str, str, str, figures.Figure | None], str]) -> str:
    """Sections on changed answers, by the original's margin and by class."""
    margins, classes = agreement.by_margin, agreement.by_class
    count = f"{agreement.changed:,} of {agreement.samples:,} samples get another answer"
    if not agreement.changed:
        return f'<h2>Changed answers</h2><p class="note">{count}.</p>'
    text = (
        f"{count} ({100 * agreement.share:.2f} %). The samples on the left are those of which the original was least "
        f"sure (the smallest difference between its two largest log-probabilities), those on the right the surest."
    )
    first = figures.shares(
        "samples by the original's margin",
        [f"{margin.low:.2g} to {margin.high:.2g}" for margin in margins],
        [100 * margin.share for margin in margins],
        [f"{margin.changed} of {margin.samples}" for margin in margins],
    )
    second = figures.shares(
        "the original's answer",
        [str(group.label) for group in classes],
        [100 * group.share for group in classes],
        [f"{group.changed} of {group.samples}" for group in classes],
    )
    return section("margins", "Changed answers", text, first) + section(
        "classes", "Changed answers by class", "The classes with the largest share of changed answers.", second
    )


def _parts(report: Report) -> str:
    rows = [
        (part.name, part.option, f"{part.bytes_before:,.0f}", f"{part.bytes_after:,.0f}", f"{part.loss_alone:.3g}")
        for part in report.parts
    ]
    heading = f"<h2>All parts ({len(rows)})</h2>"
    return heading + _table(("part", "choice", "bytes before", "after", "loss alone"), rows, words=2)


def _notes(report: Report) -> str:
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes())
    return f"<ul>{lines}</ul>" if lines else ""


def _skipped(report: Report) -> str:
    if not report.skipped:
        return ""
    lines = by_reason(report.skipped, report.skipped_bytes, report.original["bytes"])
    return f"<h2>Left unchanged</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _downloads(report: Report) -> str:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("part", "choice", "bytes_before", "bytes_after", "loss_alone"))
    writer.writerows(
        (part.name, part.option, part.bytes_before, part.bytes_after, part.loss_alone) for part in report.parts
    )
    links = [
        _link("report.json", "application/json", json.dumps(report.to_json(), indent=1, allow_nan=False)),
        _link("parts.csv", "text/csv", table.getvalue()),
    ]
    return f"<h2>The numbers</h2><nav>{' · '.join(links)}</nav>"


def _link(name: str, kind: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">{name}</a>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = [' class="words"' if index < words else "" for index in range(len(values))]
        made = (f"<{tag}{kind}>{html.escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{cells("th", columns)}</thead><tbody>{body}</tbody></table></div>'
