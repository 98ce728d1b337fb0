"""What the commands' words mean: names of callables, budgets, solver options, lists of numbers."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

CALLABLE = "PACKAGE.MODULE:CALLABLE"

Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget",
        "-b",
        metavar="NAME=LIMIT",
        help="Most of a resource that may be used: a share of the original (bytes=15% or bytes=0.15) or an amount "
        "(bytes=120_000, bytes=120kB, latency_s=20ms, bits_per_weight=4.25). May be given several times.",
    ),
]
SolverName = Annotated[str, typer.Option("--solver", "-s", help="Name of a solver; 'qcompress solvers' lists them.")]
SolverOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the solver. May be given several times."),
]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds for the solver; then the best so far is taken.")]
Seed = Annotated[int, typer.Option(help="Same seed, same answer.")]
JournalFile = Annotated[
    Path | None, typer.Option("--journal", help="A file that keeps every result as it comes; a cut command goes on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Forward = Annotated[
    str | None,
    typer.Option(metavar=CALLABLE, help="(model, batch) -> output tensor, where the default does not fit."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:callable that returns the model.")]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="package.module:callable that returns the calibration batches.")
]
Pairs = Annotated[bool, typer.Option(help="Include the pair terms between different parts.")]
Loss = Annotated[
    str,
    typer.Option(
        help="'kl' to the original's softmax ('kl:1': its classes are dimension 1), 'mse' of outputs, or "
        "package.module:callable."
    ),
]
Method = Annotated[
    str,
    typer.Option(
        help="'fisher' (a few backward passes), 'direct' (every option's true loss) or 'sampled' (language models: one "
        "backward pass a sample)."
    ),
]
Granularity = Annotated[str, typer.Option(help="'layer', or a number of output channels per block.")]
ProblemFile = Annotated[
    Path, typer.Argument(metavar="PROBLEM", help="A problem file, as 'qcompress formulate' writes.")
]


def output_option(help: str) -> Any:  # noqa: A002  (typer's own name)
    """``--output``, ``-o``."""
    return typer.Option("--output", "-o", help=help)


def named(reference: str, what: str) -> Any:
    """What ``package.module:name`` stands for; modules of the current folder are found.

    Raises:
        typer.BadParameter: it is not written so, or there is no such module or name.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise typer.BadParameter(f"{what} must be written package.module:callable, found {reference!r}.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{what} {reference!r}: no module is called {error.name!r} (looked in {Path.cwd()} and what is installed)."
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = ", ".join(name for name in vars(value) if not name.startswith("_")) or "nothing public"
            raise typer.BadParameter(f"{what} {reference!r}: {module_name} has no {part!r}; it has: {names}.")
        value = getattr(value, part)
    return value


def function(reference: str, what: str) -> Callable[..., Any]:
    """The callable that ``package.module:name`` stands for.

    Raises:
        typer.BadParameter: there is none of that name, or it cannot be called.
    """
    value = named(reference, what)
    if not callable(value):
        raise typer.BadParameter(
            f"{what} {reference!r} is a {type(value).__name__}; name a function without arguments that returns it."
        )
    return value  # type: ignore[no-any-return]


def assignments(words: Iterable[str], what: str) -> dict[str, Any]:
    """``name=value`` words as a dictionary; values are numbers, True, False, None or else strings.

    Raises:
        typer.BadParameter: a word without ``=``, or a name given twice.

    >>> assignments(["sweeps=1_000", "backend=cbc", "polish=False"], "--option")
    {'sweeps': 1000, 'backend': 'cbc', 'polish': False}
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise typer.BadParameter(f"{what} must be written name=value, found {word!r}.")
        if name in values:
            raise typer.BadParameter(f"{what} gives {name!r} twice.")
        values[name] = _literal(text)
    return values


def budgets(words: Iterable[str]) -> dict[str, float | str]:
    """``name=limit`` words as a budget.

    Raises:
        typer.BadParameter: a limit that is no amount, or of an unknown unit.

    >>> budgets(["bytes=0.15", "macs=120_000", "latency_s=20 ms"])
    {'bytes': 0.15, 'macs': 120000, 'latency_s': '20 ms'}
    """
    from qcompress.budgets import parse
    from qcompress.errors import OptionsError

    limits = assignments(words, "--budget")
    for name, asked in limits.items():
        try:
            parse(name, asked)
        except OptionsError as error:
            raise typer.BadParameter(f"--budget: {error}.") from error
    return limits


def amounts(words: Iterable[str], what: str) -> dict[str, float]:
    """``name=number`` words as a dictionary.

    Raises:
        typer.BadParameter: a value that is no number.
    """
    numbers = assignments(words, what)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise typer.BadParameter(
                f"{what} {name} must be a number, as {name}=0.15 or {name}=120_000; found {value!r}."
            )
    return numbers


def numbers(text: str, what: str) -> tuple[Any, ...]:
    """Comma-separated numbers.

    Raises:
        typer.BadParameter: one of them is no number.

    >>> numbers("0, 0.5, 4", "--bits")
    (0, 0.5, 4)
    """
    values = tuple(_literal(word.strip()) for word in text.split(","))
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise typer.BadParameter(f"{what} must be numbers separated by commas, such as 2,4,8; found {wrong[0]!r}.")
    return values


def granularity(text: str) -> str | int:
    """``layer``, or a number of channels."""
    value = _literal(text)
    return value if isinstance(value, int) else text


def loss(text: str) -> Any:
    """``kl``, ``mse``, or the callable that is named."""
    from qcompress.model.losses import is_named  # here: PyTorch is slow to import

    return text if is_named(text) or ":" not in text else function(text, "--loss")


def forward(reference: str | None) -> Any:
    """The named callable, or None."""
    return None if reference is None else function(reference, "--forward")


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text
