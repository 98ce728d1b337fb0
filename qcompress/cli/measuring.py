"""``measure``, ``formulate``, ``apply``: the steps between a model and a problem, each into a file."""

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

MeasurementFile = Annotated[
    Path, typer.Argument(metavar="MEASUREMENT", help="A measurement file, as 'qcompress measure' writes.")
]
SolutionFile = Annotated[Path, typer.Argument(metavar="SOLUTION", help="A solution file, as 'qcompress solve' writes.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this family."""
    app.command()(measure)
    app.command()(formulate)
    app.command()(apply)


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


def formulate(
    measurement_file: MeasurementFile,
    budget: arguments.Budgets,
    pairs: Annotated[bool, typer.Option(help="With the terms between different parts.")] = True,
    output: Annotated[Path, typer.Option("--output", "-o", help="The problem file to write.")] = Path("problem.npz"),
    as_json: arguments.AsJson = False,
) -> None:
    """State the choice as a problem with budgets. Takes no model and no data, and no time.

    Example: `qcompress formulate measurement.npz --budget bytes=0.15 --budget macs=0.5`
    """
    from qcompress import Measurement
    from qcompress import formulate as state

    limits = arguments.budgets(budget)
    problem = state(Measurement.load(measurement_file), limits, pairs=pairs)
    problem.require_reachable_budgets()
    problem.save(output)
    say(f"written: {output}")
    smallest = problem.minimum_usage()
    if as_json:
        budgets = dict(problem.budgets)
        print_json({"file": str(output), "groups": problem.num_groups, "budgets": budgets, "smallest": smallest})
        return
    rows = [(name, amount(limit), amount(smallest[name])) for name, limit in problem.budgets.items()]
    print_table(("resource", ">budget", ">smallest possible"), rows)


def apply(
    model: arguments.Model,
    measurement_file: MeasurementFile,
    solution_file: SolutionFile,
    batch_norm: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="package.module:callable of batches to re-estimate batch norms on."),
    ] = None,
    forward: arguments.Forward = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The model file to write.")] = Path(
        "model.safetensors"
    ),
    as_json: arguments.AsJson = False,
) -> None:
    """Apply a solution to the model and save the compressed model as real bytes.

    Load it with `qcompress.load_compressed(path, model_factory)`.

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
    say(f"written: {output}")
    if as_json:
        print_json({"file": str(output), "payload_bytes": saved.payload_bytes, "file_bytes": saved.file_bytes})
        return
    print_table(("", ""), [("payload", f"{saved.payload_bytes:,} bytes"), ("file", f"{saved.file_bytes:,} bytes")])
