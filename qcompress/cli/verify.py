"""``verify``: run an engine's file on samples and compare it with the model it was written from."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import FAILED, print_json, print_table
from qcompress.cli.export import CompressedFile, Settings, TargetName, load
from qcompress.cli.shared_flags import engine_of


def verify(
    model: arguments.Model,
    compressed: CompressedFile,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The engine's file, as written by 'qcompress export'.")],
    data: arguments.Data,
    target: TargetName,
    setting: Settings = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Run an engine's file on samples and compare bytes, weights and outputs with the compressed model.

    The exit code is 1 if they differ from the prediction.

    Example: `qcompress verify zoo:smollm small.safetensors small.gguf zoo:sentences --target llama.cpp`
    """
    from dataclasses import asdict

    import qcompress

    batches = arguments.function(data, "DATA")()
    verification = qcompress.verify(file, load(model, compressed), batches, target=engine_of(target, setting))
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
            ("as predicted", "yes" if verification.ok else f"no: {verification.why_not}"),
        ]
        print_table(("", ""), rows)
    if not verification.ok:
        raise typer.Exit(FAILED)
