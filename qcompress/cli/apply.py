"""``apply``: apply a solution to the model and save the compressed model."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say
from qcompress.cli.formulate import MeasurementFile

SolutionFile = Annotated[
    Path, typer.Argument(metavar="SOLUTION", help="A solution file, as written by 'qcompress solve'.")
]


def apply(
    model: arguments.Model,
    measurement_file: MeasurementFile,
    solution_file: SolutionFile,
    batch_norm: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="package.module:callable that returns batches to re-estimate batch norms on."
        ),
    ] = None,
    forward: arguments.Forward = None,
    output: Annotated[Path, arguments.output_option("The model file to write.")] = Path("model.safetensors"),
    as_json: arguments.AsJson = False,
) -> None:
    """Apply a solution to the model and save the compressed model in its compressed size.

    Load it with `qcompress.load_compressed(path, function)`, where the function returns the original model.

    Example: `qcompress apply zoo:resnet20 measurement.npz problem.solution.json --output small.safetensors`
    """
    import qcompress

    smaller = qcompress.apply(
        arguments.function(model, "MODEL")(),
        qcompress.Measurement.load(measurement_file),
        qcompress.Solution.load(solution_file),
        batch_norm_data=None if batch_norm is None else arguments.function(batch_norm, "--batch-norm")(),
        forward=arguments.forward(forward),
    )
    saved = qcompress.save_compressed(smaller, output)
    say(f"wrote {output}")
    if as_json:
        print_json({"file": str(output), "payload_bytes": saved.payload_bytes, "file_bytes": saved.file_bytes})
        return
    print_table(("", ""), [("payload", f"{saved.payload_bytes:,} bytes"), ("file", f"{saved.file_bytes:,} bytes")])
