"""``instances``: list, verify and improve a library of problems with their best known choices and bounds."""

from pathlib import Path
from typing import Annotated

import typer

from formulations.errors import FileFormatError
from formulations.formatting import number, percent
from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, print_table, say
from solvers import Solution
from solvers.library import Library
from solvers.library.library import RECORDS_FILE
from solvers.solution import uninterrupted

Folder = Annotated[Path, typer.Argument(metavar="LIBRARY", help="Folder that contains records.json.")]
Published = Annotated[
    Path | None, typer.Option(help="Folder of the published instances, which are not part of the library.")
]
Only = Annotated[str, typer.Option(help="Only instances whose names contain this text.")]


def register(app: typer.Typer) -> None:
    """Add the ``instances`` commands."""
    instances = typer.Typer(help="A library of instances with proven records.", rich_markup_mode="markdown")
    instances.command("list")(list_instances)
    instances.command()(verify)
    instances.command()(improve)
    app.add_typer(instances, name="instances", no_args_is_help=True)


def list_instances(folder: Folder, only: Only = "", as_json: arguments.AsJson = False) -> int:
    """List the instances: best known objective, proven gap, and who found it.

    Example: `qcompress instances list benchmarks/instances`
    """
    library = _opened(folder)
    library.require_whole()
    records = [record for record in library if only in record.name]
    if as_json:
        from dataclasses import asdict

        print_json([asdict(record) for record in records])
    else:
        rows = [
            (record.name, number(record.best, 10), "proven" if record.proven else percent(record.gap), record.found_by)
            for record in records
        ]
        print_table(("instance", ">best known", ">gap", "found by"), rows)
    return 0


def verify(folder: Folder, published: Published = None, only: Only = "") -> int:
    """Recompute every record: the problem's fingerprint, its best choice's objective and budgets, its bound.

    Example: `qcompress instances verify benchmarks/instances`
    """
    library = _opened(folder, published)
    failed = checked = absent = 0
    for name, error in library.damaged:
        if only in name:
            failed += 1
            complain(f"{name}: {error}")
    for record in library:
        if only not in record.name:
            continue
        if not library.has(record.name):
            absent += 1
            continue
        checked += 1
        if wrong := library.check(record.name):
            failed += 1
            complain(f"{record.name}: {'; '.join(wrong)}")
    say(f"{checked} instances recomputed, {absent} published ones not available")
    return complain(f"{failed} records are wrong") if failed else 0


def improve(
    folder: Folder,
    solver: arguments.SolverName = "auto",
    time_limit: arguments.TimeLimit = 10.0,
    seed: arguments.Seed = 0,
    published: Published = None,
    only: Only = "",
) -> int:
    """Solve the instances that are not proven optimal, and record better choices and bounds.

    Example: `qcompress instances improve benchmarks/instances --solver auto --time-limit 60`
    """
    from solvers import solve

    library = _opened(folder, published)
    library.require_whole()
    for record in list(library):
        if only in record.name and not record.proven and library.has(record.name):
            start = library.choices.get(record.name)
            problem = library.problem(record.name)
            solution: Solution = solve(problem, solver, time_limit=time_limit, seed=seed, initial=start)
            better = library.improve(record.name, solution)
            if better:
                library.save()
            uninterrupted(solution)
            after = library.records[record.name]
            word = "improved" if better else "as before"
            say(f"{record.name}: {word}, best {number(after.best, 10)}, gap {percent(after.gap)}")
    return 0


def _opened(folder: Path, published: Path | None = None) -> Library:
    """Open an existing library.

    Raises:
        FileFormatError: there is none in the folder.
    """
    if not (folder / RECORDS_FILE).exists():
        raise FileFormatError(f"{folder} is not a library of instances: it has no {RECORDS_FILE}")
    return Library(folder, published)
