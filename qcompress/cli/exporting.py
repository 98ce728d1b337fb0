"""``engines``, ``export`` and ``verify``: a compressed model as an engine's own file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import FAILED, print_json, print_table, say

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress import Engine

CompressedFile = Annotated[
    Path, typer.Argument(metavar="COMPRESSED", help="A compressed model, as 'compress' and 'apply' write.")
]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="NAME=VALUE", help="A setting of the engine. May be given several times."),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this family."""
    app.command()(engines)
    app.command()(export)
    app.command()(verify)


def engines(as_json: arguments.AsJson = False) -> None:
    """List the engines that models are written for: which are here, and what is missing.

    Example: `qcompress engines`
    """
    from dataclasses import asdict

    import qcompress

    infos = qcompress.engines()
    if as_json:
        print_json([asdict(info) for info in infos])
        return
    rows = [
        (info.name, "yes" if info.available else "no",
         info.summary if info.available else f"{info.summary} [{info.why_not}]")
        for info in infos
    ]  # fmt: skip
    print_table(("engine", "here", "summary"), rows)


def export(
    model: arguments.Model,
    compressed: CompressedFile,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help="Batches, for engines that trace the model.")
    ] = None,
    setting: Settings = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")] = Path("model.out"),
    as_json: arguments.AsJson = False,
) -> None:
    """Write a compressed model as an engine's own file.

    A problem is written for other solvers by `qcompress convert`.

    Example: `qcompress export zoo:smollm small.safetensors --target llama.cpp --output small.gguf`
    """
    import qcompress
    from qcompress.model.forward import first_batch

    if target is None and Path(model).is_file():
        raise typer.BadParameter(
            f"export writes models for engines; a problem is written by 'qcompress convert {model} {compressed}'."
        )
    if target is None:
        raise typer.BadParameter("name an engine, as --target llama.cpp; 'qcompress engines' lists them.")
    engine = engine_of(target, setting)
    example = None if data is None else first_batch(arguments.function(data, "--data")())
    exported = qcompress.export(_loaded(model, compressed), output, target=engine, example=example)
    say(f"written: {exported.path}")
    if as_json:
        print_json({"file": str(exported.path), "size_bytes": exported.size_bytes})
        return
    print_table(("", ""), [("file", f"{exported.size_bytes:,} bytes")])


def verify(
    model: arguments.Model,
    compressed: CompressedFile,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'qcompress export' wrote of it.")],
    data: arguments.Data,
    target: TargetName,
    setting: Settings = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Run an engine's file on samples and compare bytes, weights and outputs with the compressed model.

    Ends with exit code 1 where they are not what they should be.

    Example: `qcompress verify zoo:smollm small.safetensors small.gguf zoo:sentences --target llama.cpp`
    """
    from dataclasses import asdict

    import qcompress

    batches = arguments.function(data, "DATA")()
    found = qcompress.verify(file, _loaded(model, compressed), batches, target=engine_of(target, setting))
    if as_json:
        print_json(asdict(found))
    else:
        rows = [
            ("bytes", f"{found.size_bytes:,}"),
            ("largest difference", f"{found.max_difference:.4g}"),
            ("KL, nats per sample", f"{found.kl:.4g}"),
            ("same largest output", f"{found.agreement:.2%}"),
            ("time against dense weights", f"{found.speedup:.2f} times as fast"),
            ("as predicted", "yes" if found.ok else f"no: {found.why_not}"),
        ]
        print_table(("", ""), rows)
    if not found.ok:
        raise typer.Exit(FAILED)


def engine_of(target: str, settings: list[str] | None) -> "Engine":
    """The engine that the words ask for."""
    from qcompress.engines.registry import as_engine

    return as_engine(target, **arguments.assignments(settings or [], "--setting"))


def _loaded(model: str, compressed: Path) -> "nn.Module":
    import qcompress

    loaded: nn.Module = qcompress.load_compressed(compressed, arguments.function(model, "MODEL"))
    return loaded
