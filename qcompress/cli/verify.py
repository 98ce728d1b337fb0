"""``verify``: run an engine's file on samples and compare it with the model it was written from."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import FAILED, print_json, print_table
from qcompress.cli.export import (
    CompressedFile,
    Length,
    Settings,
    TargetName,
    TextFile,
    batches_of,
    load,
)
from qcompress.cli.shared_flags import OriginalModel, engine_of


def verify(
    model: OriginalModel,
    compressed: CompressedFile,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The engine's file, as written by 'qcompress export'.")],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="package.module:callable that returns the batches to run. Language models also take --text.",
        ),
    ] = None,
    *,
    target: TargetName,
    text: TextFile = None,
    length: Length = 512,
    setting: Settings = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Run an engine's file on samples and compare bytes, weights and outputs with the compressed model.

    The exit code is 1 if they differ from the prediction.

    Example: `qcompress verify zoo:smollm small.safetensors small.gguf zoo:sentences --target llama.cpp`

    - a language model: `verify hf:FOLDER runs/NAME/model.safetensors small.gguf --text FILE --target llama.cpp`
    """
    from dataclasses import asdict, replace

    import qcompress
    from qcompress.run_folder import output_of

    batches = batches_of(model, data, text, length, "DATA")
    if batches is None:
        raise typer.BadParameter(
            "give DATA, package.module:callable that returns batches, or --text for a language model."
        )
    verification = qcompress.verify(file, load(model, compressed), batches, target=engine_of(target, setting))
    made = output_of(compressed.parent)
    if not verification.ok and made is not None and made != file.resolve():
        why = f"{verification.why_not}; {compressed} holds the choice made for {made}, not for this file"
        verification = replace(verification, why_not=why)
    peak = verification.peak_bytes
    if as_json:
        print_json(asdict(verification))
    else:
        rows = [
            ("bytes", f"{verification.size_bytes:,}"),
            ("largest difference", f"{verification.max_difference:.4g}"),
            *(
                []
                if verification.by_rounding is None
                else [("difference by rounding alone", f"{verification.by_rounding:.2%} of the spread")]
            ),
            ("KL, nats per sample", f"{verification.kl:.4g}"),
            ("same largest output", f"{verification.agreement:.2%}"),
            ("time against dense weights", f"{verification.speedup:.2f} times as fast"),
            *(
                []
                if peak is None
                else [("peak memory, with dense weights", f"{peak:,}, {verification.dense_peak_bytes:,} bytes")]
            ),
            *([("not compared", verification.not_compared)] if verification.not_compared else []),
            ("as predicted", "yes" if verification.ok else f"no: {verification.why_not}"),
        ]
        print_table(("", ""), rows)
    if not verification.ok:
        raise typer.Exit(FAILED)
