"""``formulate``: write a problem file from a measurement and budgets."""

from pathlib import Path
from typing import Annotated

import typer

from formulations.formatting import amount
from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say

MeasurementFile = Annotated[
    Path, typer.Argument(metavar="MEASUREMENT", help="A measurement file, as written by 'qcompress measure'.")
]


def formulate(
    measurement_file: MeasurementFile,
    budget: arguments.Budgets,
    pairs: arguments.Pairs = True,
    output: Annotated[Path, arguments.output_option("The problem file to write.")] = Path("problem.npz"),
    as_json: arguments.AsJson = False,
) -> None:
    """State the choice as a problem with budgets. This is quick, and needs neither model nor data.

    Example: `qcompress formulate measurement.npz --budget bytes=0.15 --budget macs=0.5`
    """
    from qcompress import Measurement
    from qcompress import formulate as state
    from qcompress.budgets import loose, with_resources

    limits = arguments.budgets(budget)
    measurement = with_resources(Measurement.load(measurement_file), limits)
    problem = state(measurement, limits, pairs=pairs)
    problem.require_reachable_budgets()
    problem.save(output)
    say(f"wrote {output}")
    for sentence in loose(problem.budgets, measurement.original):
        say(f"warning: {sentence}")
    smallest = problem.minimum_usage()
    if as_json:
        budgets = dict(problem.budgets)
        print_json({"file": str(output), "groups": problem.num_groups, "budgets": budgets, "smallest": smallest})
        return
    rows = [(name, amount(limit), amount(smallest[name])) for name, limit in problem.budgets.items()]
    print_table(("resource", ">budget", ">smallest possible"), rows)
