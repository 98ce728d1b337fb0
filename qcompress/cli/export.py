"""``export``: write a compressed model as an engine's file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say
from qcompress.cli.shared_flags import engine_of

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn


CompressedFile = Annotated[
    Path, typer.Argument(metavar="COMPRESSED", help="A compressed model, as written by 'compress' and 'apply'.")
]


TargetName = Annotated[str, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")]


Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="NAME=VALUE", help="A setting of the engine. May be given several times."),
]


def export(
    model: arguments.Model,
    compressed: CompressedFile,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar=arguments.CALLABLE, help="Batches, for engines that trace the model.")
    ] = None,
    setting: Settings = None,
    output: Annotated[Path, arguments.output_option("The file or folder to write.")] = Path("model.out"),
    as_json: arguments.AsJson = False,
) -> None:
    """Write a compressed model as an engine's file.

    To write a problem for other solvers, use `qcompress convert`.

    Example: `qcompress export zoo:smollm small.safetensors --target llama.cpp --output small.gguf`
    """
    import qcompress
    from qcompress.model.forward import first_batch

    if target is None and Path(model).is_file():
        raise typer.BadParameter(
            f"export writes models for engines; to write a problem, use 'qcompress convert {model} {compressed}'."
        )
    if target is None:
        raise typer.BadParameter("name an engine, for example --target llama.cpp; 'qcompress engines' lists them.")
    engine = engine_of(target, setting)
    example = None if data is None else first_batch(arguments.function(data, "--data")())
    exported = qcompress.export(load(model, compressed), output, target=engine, example=example)
    say(f"wrote {exported.path}")
    if as_json:
        print_json({"file": str(exported.path), "size_bytes": exported.size_bytes})
        return
    print_table(("", ""), [("file", f"{exported.size_bytes:,} bytes")])


def load(model: str, compressed: Path) -> "nn.Module":
    """Load a compressed model, with the original named on the command line."""
    import qcompress

    loaded: nn.Module = qcompress.load_compressed(compressed, arguments.function(model, "MODEL"))
    return loaded
