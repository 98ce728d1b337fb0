"""``sweep``: solve a problem at several budgets and draw the Pareto curve."""

from pathlib import Path
from typing import Annotated

import typer

from formulations.formatting import amount, number, percent
from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, print_table, say
from solvers.sweep import Sweep, SweepPoint


def sweep(
    problem_file: arguments.ProblemFile,
    resource: Annotated[str, typer.Option(help="The resource whose budget is varied.")] = "bytes",
    points: Annotated[int, typer.Option(help="Number of budgets, from the smallest possible use to the largest.")] = 10,
    budgets: Annotated[
        str | None, typer.Option(help="Explicit budgets instead of --points, for example 20_000,40_000,80_000.")
    ] = None,
    solver: arguments.SolverName = "auto",
    time_limit: Annotated[float | None, typer.Option(help="Seconds for every point.")] = 10.0,
    seed: arguments.Seed = 0,
    option: arguments.SolverOptions = None,
    nested: Annotated[
        bool,
        typer.Option(help="No part of a smaller model is larger than in the next one, so that one file serves all."),
    ] = False,
    journal: arguments.JournalFile = None,
    output: Annotated[Path | None, arguments.output_option("Default: PROBLEM's name with .sweep.json.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve into this PNG file.", callback=arguments.a_file)
    ] = None,
    as_json: arguments.AsJson = False,
) -> int:
    """Solve a problem at several budgets, from tight to loose, to see what more of a resource is worth.

    Every point has a bound and a price. Between two points, the optimum lies between the first one's objective and
    the second one's bound. Ctrl-C ends the run with the points so far.

    Example: `qcompress sweep problem.npz --resource bytes --points 10 --plot curve.png`
    """
    from formulations import Problem
    from qcompress.plots import plot_sweep
    from solvers.sweep import sweep as run

    problem = Problem.load(problem_file)

    def tell_point(point: SweepPoint) -> None:
        solution = point.solution
        done = f"{number(solution.objective)} ({solution.status}, {solution.wall_s:.1f} s)"
        say(f"{resource} {amount(point.budget)}: {done}")

    curve = run(
        problem,
        resource,
        points if budgets is None else arguments.numbers(budgets, "--budgets"),
        solver=solver,
        time_limit=time_limit,
        seed=seed,
        nested=nested,
        journal=journal,
        on_point=tell_point,
        **arguments.assignments(option or [], "--option"),
    )
    target = problem_file.with_suffix(".sweep.json") if output is None else output
    curve.save(target)
    say(f"wrote {target}")
    if curve.stop_reason == "INTERRUPTED":
        say(f"Ctrl-C ended the sweep with {len(curve.points)} points")
    unsolved = all(point.solution.choice is None for point in curve.points)
    if plot is not None and not unsolved:
        plot_sweep(curve, plot)
        say(f"wrote {plot}")
    if as_json:
        print_json(curve.to_json())
    else:
        print_sweep(curve)
    return complain("no choice was found at any of the budgets; allow more time") if unsolved else 0


def print_sweep(curve: Sweep) -> None:
    """Print the curve as a table."""
    rows = []
    for point in curve.points:
        solution = point.solution
        used = "–" if solution.choice is None else amount(solution.usage[curve.resource])
        values = [amount(point.budget), used, number(solution.objective), number(solution.bound), percent(solution.gap)]
        rows.append(
            (*values, str(solution.status), number(point.price, 3), number(0.01 * point.budget * point.price, 3))
        )
    columns = (f">{curve.resource} at most", ">used", ">objective", ">bound", ">gap", "status", ">price per unit")
    print_table((*columns, ">price per 1 %"), rows)
