"""``measure``: what every option of every part does to the loss, into a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import amount, print_json, print_table, say
from qcompress.cli.offering import offering
from qcompress.cli.progress import watching

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import Options
    from qcompress.measuring.offered import Offered


@offering
def measure(
    model: arguments.Model,
    data: arguments.Data,
    options: "Options | Offered",
    method: arguments.Method = "fisher",
    loss: arguments.Loss = "kl",
    granularity: arguments.Granularity = "layer",
    forward: arguments.Forward = None,
    seed: arguments.Seed = 0,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also time every option on the first batch, as the resource latency_s.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The measurement file to write.")] = Path(
        "measurement.npz"
    ),
    as_json: arguments.AsJson = False,
) -> None:
    """Measure what every way to compress every part does to the loss. The expensive step; do it once.

    A run that was cut goes on where it was when the same command is given again.

    Example: `qcompress measure zoo:resnet20 zoo:batches --method direct --output resnet20.npz`

    Rank, sparsity and bits as one choice: `qcompress measure zoo:resnet20 zoo:batches --low-rank --factor-bits 4,8`
    """
    import qcompress
    from qcompress.model.forward import first_batch

    make_model, make_data = arguments.function(model, "MODEL"), arguments.function(data, "DATA")
    network, batches, run = make_model(), make_data(), arguments.forward(forward)
    with watching("measuring") as watch:
        measurement = qcompress.measure(
            network,
            batches,
            options,
            method=method,
            loss=arguments.loss(loss),
            forward=run,
            granularity=arguments.granularity(granularity),
            seed=seed,
            cache=output.with_name(f"{output.name}.part"),
            on_progress=watch.measured,
            on_encode=watch.encoded,
        )
        if latency:
            measurement = qcompress.time_options(
                network, measurement, first_batch(batches), forward=run, on_progress=watch.timed
            )
    measurement.save(output)
    say(f"written: {output}")
    summary = {
        "parts": len(measurement.parts),
        "options": len(measurement.cost),
        "samples": measurement.num_samples,
        "original": dict(measurement.original),
        "skipped": {item.name: item.reason for item in measurement.skipped},
        "tried": dict(measurement.tried),
        "notes": list(measurement.notes),
    }
    if as_json:
        print_json({"file": str(output), **summary})
        return
    rows = [
        ("parts", str(summary["parts"])),
        ("options", str(summary["options"])),
        ("samples", str(summary["samples"])),
    ]
    rows += [(f"original {name}", amount(value)) for name, value in measurement.original.items()]
    rows += [(f"left as it is: {item.name}", item.reason) for item in measurement.skipped]
    rows += [(f"tried option by option: {name}", reason) for name, reason in measurement.tried.items()]
    rows += [("note", note) for note in measurement.notes]
    print_table(("", ""), rows)
