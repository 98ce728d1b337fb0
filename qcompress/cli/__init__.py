"""The command line ``qcompress``: every step of the library as a command, every value as a file.

    MODEL DATA ──measure──▶ measurement.npz ──formulate──▶ problem.npz ──solve──▶ solution.json ──apply──▶ model file

Results go to stdout, progress and errors to stderr; with ``--json``, stdout contains nothing but JSON. If a file is to
be written to ``/dev/stdout``, stdout contains nothing but this file, and results go to stderr too. In both cases what
the caller's modules print goes to stderr. An error is one line with exit code 2 (invalid command line) or 1 (anything
else); ``--debug`` shows the traceback. The error of impossible budgets is preceded by the reason, which ``--json``
prints on stdout under ``infeasibility``. Ctrl-C ends with exit code 130. The commands contain no logic: each calls one
function of the library, imported only when it runs.
"""

import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import qcompress
from formulations.interrupts import is_interrupt
from qcompress.cli import (
    apply,
    compare,
    compress,
    convert,
    demo,
    engines,
    export,
    finetune,
    formulate,
    instances,
    leap,
    measure,
    report,
    show,
    solve,
    solvers,
    sweep,
    verify,
)
from qcompress.cli.console import INTERRUPTED, MISUSED, complain, leaving_stdout_alone

EPILOG = "Errors are one line; add --debug for the traceback. Every command has its own --help."

app = typer.Typer(
    name="qcompress",
    help="Choose how to compress a PyTorch model by solving the choice as an optimisation problem, with a proven gap.",
    epilog=EPILOG,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo.demo, compress.compress, measure.measure, formulate.formulate, apply.apply, finetune.finetune,
    solvers.solvers, solve.solve, compare.compare, sweep.sweep, convert.convert,
    engines.engines, export.export, verify.verify, show.show, report.report,
):  # fmt: skip
    app.command()(command)
leap.register(app)
instances.register(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qcompress {qcompress.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no command; the program's help text is where the app is created."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; called by `qcompress_script`.

    Args:
        arguments: words after the program's name; None takes them from ``sys.argv``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if any(re.fullmatch(r"|--?[\w-]+=", word) for word in words):  # an empty path would be the current folder
        return complain("an argument or the value of an option is empty: leave it out, or give one.", MISUSED)
    try:
        with leaving_stdout_alone(words):
            result = app(words or ["--help"], prog_name="qcompress", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except Exception as error:
        if is_interrupt(error):
            return complain("interrupted", INTERRUPTED)
        if debug:
            raise
        return complain(error)
    if result == INTERRUPTED:
        return complain("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0
