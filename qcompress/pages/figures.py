"""Figures of a run for Plotly, as plain data: traces and layout, without the colours of a theme."""

import math
from collections.abc import Sequence
from typing import Any

from qcompress.report import Report
from solvers import Solution
from solvers.sweep import Sweep

Figure = dict[str, Any]

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
"""Okabe and Ito's palette, distinguishable for colour-blind readers; marks differ in shape as well."""

ROW = 22
"""Height of a part's bar in pixels."""


def figure(traces: Sequence[Figure], x: str, y: str, *, height: int = 360, **layout: Any) -> Figure:
    """Return a figure with traces between two named axes."""
    axes = {"xaxis": {"title": {"text": x}, "automargin": True}, "yaxis": {"title": {"text": y}, "automargin": True}}
    for name in axes:
        axes[name] |= layout.pop(name, {})
    base = {"height": height, "margin": {"t": 16, "r": 16, "l": 64, "b": 52}, "hovermode": "closest"}
    base["modebar"] = {"bgcolor": "rgba(0,0,0,0)"}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return {"data": list(traces), "layout": {**base, "legend": legend, **axes, **layout}}


def scale(*values: float | None) -> Figure:
    """Return the settings of an axis: logarithmic if all values are positive and span a wide range."""
    known = [value for value in values if value is not None]
    apart = len(known) > 1 and min(known) > 0 and max(known) > 30 * min(known)
    return {"type": "log", "exponentformat": "power"} if apart else {}


def bytes_by_part(report: Report) -> Figure | None:
    """Bytes of every part before and after, as bars in the model's order."""
    parts = report.parts[::-1]
    if not parts:
        return None
    names = [part.name for part in parts]

    def bars(name: str, values: list[float], colour: str) -> Figure:
        hover = [f"{part.name}<br>{part.option}<br>%{{x:,.0f}} bytes<extra>{name}</extra>" for part in parts]
        marker = {"color": colour}
        return {
            "type": "bar", "orientation": "h", "name": name, "y": names, "x": values, "marker": marker,
            "hovertemplate": hover,
        }  # fmt: skip

    before = bars("before", [part.bytes_before for part in parts], ORANGE)
    after = bars("after", [part.bytes_after for part in parts], BLUE)
    return figure([after, before], "bytes", "", height=120 + ROW * len(parts), yaxis={"type": "category"}, bargap=0.25)


def loss_by_part(report: Report) -> Figure | None:
    """Loss of every part's option alone against the share of its bytes that remains."""
    parts = [part for part in report.parts if part.bytes_before > 0]
    if not parts:
        return None
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [100 * part.bytes_after / part.bytes_before for part in parts],
        "y": [part.loss_alone for part in parts],
        "text": [f"{part.name}<br>{part.option}" for part in parts],
        "hovertemplate": "%{text}<br>%{x:.1f} % of its bytes<br>loss alone %{y:.3g}<extra></extra>",
        "marker": {"color": BLUE, "size": 9},
    }
    return figure([trace], "bytes left (%)", "predicted loss of this option alone")


def candidates(report: Report) -> Figure | None:
    """Predicted loss against true loss on the held-out samples, for every candidate of the guard with a finite one."""
    everything = (*report.candidates, *report.undecided)
    tried = [candidate for candidate in everything if math.isfinite(candidate.loss_validation)]
    if not tried:
        return None
    won = [candidate.name == report.chosen for candidate in tried]
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [candidate.loss_predicted for candidate in tried],
        "y": [candidate.loss_validation for candidate in tried],
        "text": [candidate.name for candidate in tried],
        "hovertemplate": "%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g}<extra></extra>",
        "marker": {
            "color": [BLUE if best else ORANGE for best in won],
            "symbol": ["star" if best else "circle" for best in won],
            "size": [15 if best else 9 for best in won],
        },
    }
    values = [value for candidate in tried for value in (candidate.loss_predicted, candidate.loss_validation)]
    axis, ends = scale(*values), [min(values), max(values)]
    equal = {
        "type": "scatter", "mode": "lines", "x": ends, "y": ends, "hoverinfo": "skip",
        "line": {"color": "gray", "dash": "dot", "width": 1},
    }  # fmt: skip
    named = ("predicted loss", "loss on held-out samples")
    return figure([equal, trace], *named, showlegend=False, xaxis=axis, yaxis=dict(axis))


def race(solution: Solution) -> Figure | None:
    """Incumbent and bound over the solver's time."""
    known = [point for point in solution.trace if point.objective is not None or point.bound is not None]
    if len(known) < 2:
        return None

    def line(name: str, values: list[float | None], colour: str, dash: str) -> Figure:
        return {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": [point.t_s for point in known], "y": values,
            "line": {"shape": "hv", "color": colour, "dash": dash}, "connectgaps": True,
            "hovertemplate": f"%{{x:.3g}} s: {name} %{{y:.6g}}<extra></extra>",
        }  # fmt: skip

    return figure(
        [
            line("best choice", [point.objective for point in known], BLUE, "solid"),
            line("proven bound", [point.bound for point in known], ORANGE, "dash"),
        ],
        "time (s)",
        "predicted loss",
    )


def front(sweep: Sweep) -> Figure | None:
    """Least predicted loss at every budget, with the proven lower bound; on a logarithmic axis without zeros."""
    points = [point for point in sweep.points if point.solution.objective is not None]
    if not points:
        return None
    budget = [point.budget for point in points]
    chosen = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "best choice",
        "x": budget,
        "y": [point.solution.objective for point in points],
        "customdata": [[point.price, 100 * (point.solution.gap or 0.0)] for point in points],
        "hovertemplate": f"%{{x:,.0f}} {sweep.resource}<br>loss %{{y:.4g}}<br>price %{{customdata[0]:.3g}} a unit"
        "<br>gap %{customdata[1]:.3g} %<extra></extra>",
        "line": {"color": BLUE},
    }
    bound = {
        "type": "scatter", "mode": "lines", "name": "proven bound", "x": budget,
        "y": [point.solution.bound for point in points], "line": {"color": ORANGE, "dash": "dash"}, "hoverinfo": "skip",
    }  # fmt: skip
    values = [value for point in points for value in (point.solution.objective, point.solution.bound)]
    losses = scale(*(value for value in values if value != 0))
    named = (f"budget ({sweep.resource})", "predicted loss")
    return figure([chosen, bound], *named, xaxis=scale(*budget), yaxis=losses)


def shares(title: str, names: Sequence[str], values: Sequence[float], hover: Sequence[str]) -> Figure | None:
    """Shares in percent as bars, one for each name."""
    if not any(values):
        return None
    trace = {
        "type": "bar", "x": list(names), "y": list(values), "marker": {"color": PINK}, "text": list(hover),
        "textposition": "none", "hovertemplate": "%{x}<br>%{text}<extra></extra>",
    }  # fmt: skip
    return figure([trace], title, "samples that change (%)", xaxis={"type": "category"}, height=300)
