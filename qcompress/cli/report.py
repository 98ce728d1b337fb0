"""``report``: write a run of `compress` as one HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import print_lines, say

if TYPE_CHECKING:
    from solvers.sweep import Sweep

POINTS = 12


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run of 'compress'.")],
    output: Annotated[Path | None, arguments.output_option("The page. Default: report.html in the folder.")] = None,
    sweep: Annotated[
        float,
        typer.Option(
            help="Seconds for solving the run's problem at other budgets, to draw the curve. Default: no curve.", min=0
        ),
    ] = 0.0,
    opened: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a run as one HTML file that opens offline: choices, proof, predicted and measured loss, changed answers.

    Example: `qcompress report runs/small --sweep 20 --open`
    """
    from qcompress.pages import write_report_page

    page = write_report_page(run, output, sweep=_swept(run / "problem.npz", sweep) if sweep else None)
    print_lines(str(page))
    if opened:
        typer.launch(str(page.resolve()))


def _swept(problem_file: Path, seconds: float) -> "Sweep":
    """Solve the problem at several budgets of its first budgeted resource."""
    from formulations import Problem
    from solvers.sweep import sweep

    problem = Problem.load(problem_file)
    resource = next(iter(problem.budgets or problem.resources))
    say(f"solving {POINTS} budgets of {resource}")
    return sweep(problem, resource, POINTS, time_limit=seconds / POINTS)
