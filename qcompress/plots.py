"""Plots of results: thin drawing functions over plain data, written atomically as PNG.

They need matplotlib (the extra ``plots``), which is imported only when something is drawn.
"""

import io
from typing import Any

import numpy as np

from formulations.files import AnyPath, replacing
from qcompress.errors import MissingError
from solvers.base import relative_gap
from solvers.compare.runs import Comparison, Curve, Suite, anytime, performance_profile
from solvers.sweep import Sweep

# Okabe and Ito's palette, distinguishable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":", "-.")  # when the colours repeat, the line style changes
SMALLEST_GAP = 1e-6  # smaller gaps are drawn here, because a logarithmic axis has no zero


def plot_anytime(comparison: Comparison, path: AnyPath) -> None:
    """Draw every solver's best objective over time, and write the plot to ``path`` as PNG.

    A line shows the median over the seeds and a band their range. The vertical axis is the gap to the best bound that
    any solver proved, in percent; without a positive bound it is the objective.

    Raises:
        MissingError: matplotlib is not installed.
        ValueError: no run found a choice, so there is nothing to draw.

    >>> import pathlib, tempfile
    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "anytime.png"
    >>> plot_anytime(compare(layered_problem(4), ["brute-force"]), file)
    >>> file.read_bytes()[1:4]
    b'PNG'
    """
    curves = [curve for curve in anytime(comparison) if np.isfinite(curve.lowest).any()]
    if not curves:
        raise ValueError("no run found a choice, so there is nothing to draw")
    figure = _figure()
    axes = figure.add_subplot()
    as_gap = comparison.bound is not None and comparison.bound > 0
    start = min(_first(curve) for curve in curves)
    end = max(float(curve.t_s[-1]) for curve in curves)
    for index, curve in enumerate(curves):
        _draw(axes, curve, comparison.bound if as_gap else None, _style(index), start)
    axes.set_xscale("log")
    axes.set_xlim(start, end * 1.05)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.set_xlabel("time (s)")
    if as_gap:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda gap, _: f"{'≤ ' if gap <= SMALLEST_GAP else ''}{gap * 100:g} %")
        axes.set_ylabel("gap to the best bound")
        if axes.get_ylim()[0] <= SMALLEST_GAP:
            axes.set_ylim(bottom=SMALLEST_GAP * 0.7)
    else:
        axes.set_ylabel("objective")
    seeds = len(comparison.seeds)
    _finish(axes, "Best choice so far" + (f": median and range of {seeds} seeds" if seeds > 1 else ""))
    _write(figure, path)


def plot_profile(compared: Comparison | Suite, path: AnyPath, *, within: float | None = None) -> None:
    """Draw performance profiles (see `solvers.compare.curves.performance_profile`) and write them to ``path`` as PNG.

    A solver that never reached the target has a line at 0 %.

    Raises:
        MissingError: matplotlib is not installed.

    >>> import pathlib, tempfile
    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.compare.runs import compare
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "profile.png"
    >>> plot_profile(compare(layered_problem(4), ["brute-force", "greedy"]), file)
    >>> file.read_bytes()[1:4]
    b'PNG'
    """
    profiles = performance_profile(compared, within=within)
    figure = _figure()
    axes = figure.add_subplot()
    end = max(2.0, float(profiles[0].ratio[-1]) * 1.2)
    for index, profile in enumerate(profiles):
        ratio, share = np.append(profile.ratio, end), np.append(profile.share, profile.share[-1])
        axes.plot(ratio, share, drawstyle="steps-post", label=profile.label, linewidth=1.8, **_style(index))
    axes.set_xscale("log")
    axes.set_xlim(1.0, end)
    axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes.set_xlabel("time, as a multiple of the quickest solver's")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:.0f} %")
    axes.set_ylabel("runs that reached the target")
    words = compared.target_words if within is None else f"{within * 100:g}%"
    _finish(axes, f"Time to target ({words}): performance profile")
    _write(figure, path)


def plot_sweep(sweep: Sweep, path: AnyPath) -> None:
    """Draw the least objective over the budget, and write the plot to ``path`` as PNG.

    The points are the solutions found; the band contains the optimum for every budget, also between the points.

    Raises:
        MissingError: matplotlib is not installed.
        ValueError: no point has a choice, so there is nothing to draw.

    >>> import pathlib, tempfile
    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers.sweep import sweep
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "sweep.png"
    >>> plot_sweep(sweep(layered_problem(4), "bytes", 4), file)
    >>> file.read_bytes()[1:4]
    b'PNG'
    """
    points = [(p.budget, p.solution.objective) for p in sweep.points if p.solution.objective is not None]
    if not points:
        raise ValueError("no point has a choice, so there is nothing to draw")
    budgets, objectives = np.array(points).T
    figure = _figure()
    axes = figure.add_subplot()
    band = sweep.band()
    known = np.isfinite(band.lower) & np.isfinite(band.upper)
    axes.fill_between(band.budget, band.lower, band.upper, where=known, label="optimum is in here", alpha=0.2, lw=0)
    axes.plot(
        budgets, objectives, "o-", color=COLOURS[0], linewidth=1.8, markersize=5, label=f"found by {sweep.solver}"
    )
    if budgets[0] > 0 and budgets[-1] > 4 * budgets[0]:
        axes.set_xscale("log")
    if min(objectives.min(), band.lower[known].min(initial=np.inf)) > 0 and objectives[0] > 10 * objectives[-1]:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda budget, _: f"{budget:,.10g}")
    axes.yaxis.set_major_formatter(lambda objective, _: f"{objective:g}")
    axes.set_xlabel(f"{sweep.resource} at most")
    axes.set_ylabel("objective")
    _finish(axes, f"What {sweep.resource} buy")
    _write(figure, path)


def _style(index: int) -> dict[str, str]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index // len(COLOURS) % len(LINES)]}


def _finish(axes: Any, title: str) -> None:
    axes.grid(visible=True, color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_title(title, loc="left")


def _draw(axes: Any, curve: Curve, bound: float | None, style: dict[str, str], start: float) -> None:
    def height(values: Any) -> Any:
        if bound is None:
            return np.where(np.isfinite(values), values, np.nan)
        gaps = [relative_gap(value, bound) if np.isfinite(value) else np.nan for value in values.tolist()]
        return np.maximum(np.array(gaps, dtype=np.float64), SMALLEST_GAP)

    times = np.maximum(curve.t_s, start)
    median, low, high = height(curve.median), height(curve.lowest), height(curve.highest)
    axes.fill_between(times, low, high, step="post", color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(times, median, drawstyle="steps-post", label=curve.label, linewidth=1.8, **style)
    axes.plot(times[-1:], median[-1:], "o", markersize=5, color=style["color"])  # end of the last run


def _first(curve: Curve) -> float:
    """Time of the solver's first choice, at least a millisecond because a logarithmic axis has no zero."""
    return max(float(curve.t_s[np.isfinite(curve.lowest)][0]), 1e-3)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingError("drawing needs matplotlib: pip install 'qcompress[plots]'") from error
    return Figure(figsize=(8.0, 4.5), dpi=150, layout="constrained")


def _write(figure: Any, path: AnyPath) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with replacing(path) as file:
        file.write(buffer.getvalue())
