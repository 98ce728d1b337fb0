"""Output: results to stdout, everything else to stderr, and errors as one line with an exit code."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from formulations import FormulationError
from qcompress.cli.arguments import CALLABLE
from qcompress.errors import QcompressError
from solvers import SolverError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
KNOWN = (FormulationError, SolverError, QcompressError, OSError)

PIPED_WIDTH = 140  # output to a file or pager is not wrapped at 80 columns

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)
err = Console(stderr=True)


STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextlib.contextmanager
def leaving_stdout_alone(words: Sequence[str]) -> Iterator[None]:
    """Keep out of stdout what would corrupt it, according to the command line's words.

    If one names stdout as a file, results are printed on stderr. With that, or ``--json``, so is all that the caller's
    own modules print.
    """
    to_file = any(word.endswith(STDOUT) for word in words)
    if not to_file and ("--json" not in words or "--help" in words):
        yield
        return
    out.file = sys.stderr if to_file else sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        out.file = None  # type: ignore[assignment]  # whatever stdout is then


def say(text: str) -> None:
    """Print a progress message on stderr."""
    err.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def say_lines(*lines: str) -> None:
    """Print plain lines on stderr, such as what belongs to an error."""
    for line in lines:
        err.print(line, highlight=False, markup=False, soft_wrap=True)


def complain(error: Exception | str, code: int = FAILED) -> int:
    """Print an error as one line on stderr and return its exit code."""
    if hasattr(error, "format_message"):  # an invalid command line, with a message from typer
        command = getattr(getattr(error, "ctx", None), "command_path", "qcompress")
        text = error.format_message().rstrip() + _instead(error)
        text, code = f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} Try '{command} --help'.", MISUSED
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror}: {error.filename}"
    elif isinstance(error, (str, *KNOWN)):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (unexpected; --debug shows where)"
    err.print("error: " + " ".join(text.split()), style="red", highlight=False, markup=False, soft_wrap=True)
    return code


def _instead(error: Any) -> str:
    """Name the options that take a callable if one was given as an argument too many; otherwise nothing."""
    if not (error.message.startswith("Got unexpected extra argument") and ":" in error.message):
        return ""
    options = [param for param in error.ctx.command.params if param.param_type_name == "option"]
    names = [option.opts[0] for option in options if option.metavar in (CALLABLE, "DATA")]
    return f": package.module:callable is given with {' or '.join(names)}" if names else ""


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    """Let an error of writing to stdout, which names no file, say what could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON on stdout, and nothing else."""
    print_lines(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


def print_text(text: str) -> None:
    """Print text on stdout unchanged, without adding a line end."""
    with _naming_stdout():
        out.file.write(text)
        out.file.flush()


def print_lines(*lines: str) -> None:
    """Print plain lines on stdout."""
    with _naming_stdout():
        for line in lines:
            out.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table on stdout. A column name starting with ``>`` aligns right; all names may be empty."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.show_header = any(columns)
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # not markup: names may contain rich's square brackets
    with _naming_stdout():
        out.print(table)
