"""Arguments shared by commands, and conversion of their text: callables, budgets, solver options, lists of numbers."""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from formulations.files import missing_folder
from solvers.solver_text import value_of

CALLABLE = "PACKAGE.MODULE:CALLABLE"

Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget",
        "-b",
        metavar="NAME=LIMIT",
        help="Maximum use of a resource: a share of the original (bytes=15% or bytes=0.15) or an amount "
        "(bytes=120_000, bytes=120kB, latency_s=20ms). bits_per_weight takes a number, as 4.25. file_bytes is the "
        "engine's file or, without an engine, the package's own; memory is this file with the keys and values of "
        "--context tokens. May be given several times.",
    ),
]
SolverName = Annotated[
    str,
    typer.Option(
        "--solver",
        "-s",
        callback=lambda words: _solver_words(words),
        help="Name of a solver ('qcompress solvers' lists them), or package.module:object for a solver or dimod "
        "sampler of your own.",
    ),
]
SolverOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="An option of the solver. May be given several times."),
]
TimeLimit = Annotated[
    float | None, typer.Option(help="Seconds for the solver, which then returns the best choice so far.")
]
Seed = Annotated[int, typer.Option(help="Random seed; the same seed gives the same answer.")]
JournalFile = Annotated[
    Path | None,
    typer.Option("--journal", help="File for intermediate results, from which an interrupted command resumes."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else; for impossible budgets it says why.")
]
Forward = Annotated[
    str | None,
    typer.Option(metavar=CALLABLE, help="(model, batch) -> output tensor, for models that the default does not fit."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:callable that returns the model.")]
Pairs = Annotated[bool, typer.Option(help="Include the pair terms between different parts.")]
Loss = Annotated[
    str,
    typer.Option(
        help="'kl' divergence from the original's softmax ('kl:1': classes in dimension 1; 'kl-tail': unsure samples "
        "weigh more), 'mse' of outputs, or package.module:callable."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="'fisher' (a few backward passes), 'direct' (every option's true loss) or 'sampled' (language models: one "
        "backward pass per sample). Default: fisher; for hf:FOLDER and gguf:FILE sampled, the only one for a folder "
        "that is read block by block.",
        show_default=False,
    ),
]
Granularity = Annotated[str, typer.Option(help="'layer', or the number of output channels per block.")]
ProblemFile = Annotated[
    Path, typer.Argument(metavar="PROBLEM", help="A problem file, as written by 'qcompress formulate'.")
]


def output_option(help: str) -> Any:  # noqa: A002  (name in typer)
    """Return the option ``--output``, ``-o``, for a file in a folder that exists."""
    return typer.Option("--output", "-o", help=help, callback=a_file)


def folder_option(help: str) -> Any:  # noqa: A002
    """Return the option ``--output``, ``-o``, for a folder, which is made with those around it."""
    return typer.Option("--output", "-o", help=help, callback=a_folder)


def a_file(output: Path | None) -> Path | None:
    """Return the path of a file to write unchanged.

    Raises:
        typer.BadParameter: it is a folder, or the folder around it does not exist.
    """
    if output is not None and output.is_dir():
        raise typer.BadParameter(f"{str(output)!r} is a folder: name a file, such as one in it.")
    return in_folder(output)


def a_folder(output: Path) -> Path:
    """Return the path of a folder to write into unchanged.

    Raises:
        typer.BadParameter: it, or what stands in place of a folder around it, is a file.
    """
    if file := next((place for place in (output, *output.parents) if place.is_file()), None):
        raise typer.BadParameter(f"{str(file)!r} is a file: name a folder.")
    return output


def in_folder(output: Path | None) -> Path | None:
    """Return the path unchanged.

    Raises:
        typer.BadParameter: the folder around it does not exist.
    """
    if output is not None and (folder := missing_folder(output)) is not None:
        raise typer.BadParameter(f"there is no folder {str(folder)!r} for {output.name}.")
    return output


def named(reference: str, what: str) -> Any:
    """Return the object that ``package.module:name`` stands for; modules in the current folder are found.

    Raises:
        typer.BadParameter: the reference has another form, or the module or name does not exist.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise typer.BadParameter(f"{what} must be written package.module:callable, found {reference!r}.")
    if module_name in ("hf", "gguf"):
        raise typer.BadParameter(
            f"{what} {reference!r}: hf:FOLDER and gguf:FILE are for 'compress', 'measure', 'export' and 'verify'; here "
            "name package.module:callable."
        )
    find_modules_here()
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"{what} {reference!r}: no module is called {error.name!r} (searched {Path.cwd()} and installed packages)."
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = ", ".join(name for name in vars(value) if not name.startswith("_")) or "nothing public"
            raise typer.BadParameter(f"{what} {reference!r}: {module_name} has no {part!r}; it has: {names}.")
        value = getattr(value, part)
    return value


def find_modules_here() -> None:
    """Make modules in the current folder importable, as Python does for the folder of a script."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _solver_words(words: str) -> str:
    """Return the text unchanged; if it names a module, make modules in the current folder importable."""
    if ":" in words:
        find_modules_here()
    return words


def function(reference: str, what: str) -> Callable[..., Any]:
    """Return the callable that ``package.module:name`` stands for.

    Raises:
        typer.BadParameter: it does not exist, or cannot be called.
    """
    value = named(reference, what)
    if not callable(value):
        raise typer.BadParameter(
            f"{what} {reference!r} is of type {type(value).__name__}; name a function without arguments "
            "that returns it."
        )
    return value  # type: ignore[no-any-return]


def assignments(words: Iterable[str], what: str) -> dict[str, Any]:
    """Return ``name=value`` words as a dictionary; values are Python literals, or else strings.

    Raises:
        typer.BadParameter: a word has no ``=``, or a name is given twice.

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
        values[name] = value_of(text)
    return values


def budgets(words: Iterable[str]) -> dict[str, float | str]:
    """Return ``name=limit`` words as a budget.

    Raises:
        typer.BadParameter: a limit is not an amount, or has an unknown unit.

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
            raise typer.BadParameter(f"{error}.") from error
    return limits


def amounts(words: Iterable[str], what: str) -> dict[str, float]:
    """Return ``name=number`` words as a dictionary.

    Raises:
        typer.BadParameter: a value is not a number.
    """
    numbers = assignments(words, what)
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise typer.BadParameter(
                f"{what} {name} must be a number, for example {name}=0.15 or {name}=120_000; found {value!r}."
            )
    return numbers


def numbers(text: str, what: str) -> tuple[Any, ...]:
    """Return comma-separated numbers.

    Raises:
        typer.BadParameter: one of them is not a number.

    >>> numbers("0, 0.5, 4", "--bits")
    (0, 0.5, 4)
    """
    values = tuple(_literal(word.strip()) for word in text.split(","))
    if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise typer.BadParameter(f"{what} must be numbers separated by commas, such as 2,4,8; found {wrong[0]!r}.")
    return values


def granularity(text: str) -> str | int:
    """Return ``layer``, or a number of channels."""
    value = _literal(text)
    return value if isinstance(value, int) else text


def loss(text: str) -> Any:
    """Return ``kl``, ``mse``, or the named callable."""
    from qcompress.model.losses import is_named  # here: PyTorch is slow to import

    return text if is_named(text) or ":" not in text else function(text, "--loss")


def forward(reference: str | None) -> Any:
    """Return the named callable, or None."""
    return None if reference is None else function(reference, "--forward")


def _literal(text: str) -> Any:
    value = value_of(text)
    return value if value is None or isinstance(value, bool | int | float | str) else text
