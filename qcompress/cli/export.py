"""``export``: write a compressed model as an engine's file."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say
from qcompress.cli.language_model import TEXT, is_language_model, place_of, text_windows, whole
from qcompress.cli.shared_flags import SETTING, OriginalModel, engine_of

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn


CompressedFile = Annotated[
    Path, typer.Argument(metavar="COMPRESSED", help="A compressed model, as written by 'compress' and 'apply'.")
]


TargetName = Annotated[str, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")]


Settings = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="NAME=VALUE", help=SETTING),
]


TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Plain text, split into windows of tokens.", rich_help_panel=TEXT),
]


Length = Annotated[int, typer.Option(help="Number of tokens in a window.", min=2, rich_help_panel=TEXT)]


def export(
    model: OriginalModel,
    compressed: CompressedFile,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Name of an engine; 'qcompress engines' lists them.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar=arguments.CALLABLE,
            help="package.module:callable that returns batches, for engines that trace the model (onnxruntime).",
        ),
    ] = None,
    text: TextFile = None,
    length: Length = 512,
    setting: Settings = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file or folder to write.", callback=arguments.in_folder)
    ] = Path("model.out"),
    as_json: arguments.AsJson = False,
) -> None:
    """Write a compressed model as an engine's file.

    To write a problem for other solvers, use `qcompress convert`.

    Example: `qcompress export zoo:smollm small.safetensors --target llama.cpp --output small.gguf`

    - an engine that traces the model: `… zoo:resnet20 small.safetensors --data zoo:batches --target onnxruntime`
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
    batches = batches_of(model, data, text, length, "--data")
    example = None if batches is None else first_batch(batches)
    exported = qcompress.export(load(model, compressed), output, target=engine, example=example)
    say(f"wrote {exported.path}")
    if as_json:
        print_json({"file": str(exported.path), "size_bytes": exported.size_bytes})
        return
    print_table(("", ""), [("file", f"{exported.size_bytes:,} bytes")])


def load(model: str, compressed: Path) -> "nn.Module":
    """Load a compressed model, with the original named on the command line.

    Raises:
        typer.BadParameter: the run has no model file, because its model was read block by block.
    """
    import qcompress
    from qcompress.run_folder import CODES

    folder = compressed if compressed.is_dir() else compressed.parent
    if not compressed.is_file() and (folder / CODES).is_dir():
        raise typer.BadParameter(
            f"{folder} holds no model.safetensors, because 'compress' read the model block by block. To write and "
            "verify the engine's file again, repeat 'compress' with another --output: it reuses the results."
        )
    make = partial(whole, place_of(model)) if is_language_model(model) else arguments.function(model, "MODEL")
    loaded: nn.Module = qcompress.load_compressed(compressed, make)
    return loaded


def batches_of(model: str, data: str | None, text: Path | None, length: int, name: str) -> Any:
    """Return the batches of the callable ``data``, or two windows of a language model's text; None without either.

    Raises:
        typer.BadParameter: both are given, or a text for another model; ``name`` is what ``data`` is called.
    """
    if text is None:
        return None if data is None else arguments.function(data, name)()
    if data is not None or not is_language_model(model):
        raise typer.BadParameter(f"--text is for MODEL hf:FOLDER or gguf:FILE, without {name}.")
    return text_windows(place_of(model), text, length=length).calibration[:2]
