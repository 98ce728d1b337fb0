"""``demo``: train a small network and compress it with several solvers."""

from typing import Annotated

import typer

from formulations.formatting import number, percent
from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_lines, print_table, say


def demo(
    solver: Annotated[
        list[str] | None, typer.Option("--solver", "-s", help="A solver to try. May be given several times.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Budget as a share of the original's bytes.")] = 0.07,
    time_limit: Annotated[float, typer.Option(help="Seconds for each solver.")] = 5.0,
    seed: arguments.Seed = 0,
    as_json: arguments.AsJson = False,
) -> None:
    """Train a small network on digits, compress it with several solvers, and compare the results.

    Example: `qcompress demo --fraction 0.08`
    """
    from dataclasses import asdict

    from qcompress.demo import SOLVERS, run_demo

    result = run_demo(solvers=solver or SOLVERS, fraction=fraction, time_limit=time_limit, seed=seed, say=say)
    if as_json:
        print_json(asdict(result))
        return
    columns = ("solver", ">predicted", ">bound", ">gap", ">measured", ">bytes", ">accuracy", ">time")
    rows = [("original", "–", "–", "–", "–", f"{result.original_bytes:,}", f"{result.original_accuracy:.2%}", "–")]
    rows += [
        (
            row.solver,
            number(row.loss_predicted, 4),
            number(row.bound, 4),
            percent(row.gap),
            number(row.loss_measured, 4),
            f"{row.size_bytes:,}",
            f"{row.accuracy:.2%}",
            f"{row.solve_s:.2f} s",
        )
        for row in result.rows
    ]
    print_table(columns, rows, title=f"Digits, compressed to at most {result.budget_bytes:,} bytes")
    print_lines(
        "Predicted and measured loss increase with its proven lower bound, in nats per calibration image;",
        "accuracy on unseen images.",
    )
