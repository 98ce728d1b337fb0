"""``finetune``: train a compressed model file without changing its size."""

from pathlib import Path
from typing import Annotated

import typer

from formulations.formatting import number
from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.progress import Watch, watching
from qcompress.cli.shared_flags import CalibrationFlags


@with_flag_groups
def finetune(
    calibration: CalibrationFlags,
    small: Annotated[
        Path, typer.Argument(metavar="SMALL", help="A compressed model, as written by 'qcompress compress' or 'apply'.")
    ],
    steps: Annotated[int, typer.Option(help="Maximum number of steps, one batch each.", min=1)] = 1000,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate; it rises over the first fifth of the steps, then falls.")
    ] = 3e-4,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar=arguments.CALLABLE,
            help="Batches for selecting the best weights. Default: the first four of DATA.",
        ),
    ] = None,
    output: Annotated[Path | None, arguments.output_option("Default: SMALL's name with .tuned.safetensors.")] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Train a compressed model to match the outputs of the original MODEL, without changing its size.

    No labels are needed. Training ends early when the loss stops falling, and never raises the loss. If a run is
    interrupted, the same command resumes it; Ctrl-C keeps the best weights so far.

    Example: `qcompress finetune zoo:resnet20 zoo:training runs/small/model.safetensors --steps 2000`
    """
    import qcompress

    target = small.with_suffix(".tuned.safetensors") if output is None else output
    cache = target.with_name(f"{target.name}.part")
    settings = calibration.arguments()
    if validation is not None:
        settings["validation"] = arguments.function(validation, "--validation")()
    teacher, batches = calibration.model_and_data()
    with watching("fine-tuning") as watch:
        tuned = qcompress.finetune(
            qcompress.load_compressed(small, arguments.function(calibration.model, "MODEL")),
            batches,
            steps,
            teacher=teacher,
            learning_rate=learning_rate,
            cache=cache,
            on_progress=watch.finetuned,
            **settings,
        )
    saved = qcompress.save_compressed(tuned, target)
    tell_end(watch, cache)
    say(f"wrote {target}")
    last = watch.finetuning
    assert last is not None  # noqa: S101  (reported before the first step)
    values = {"steps": last.step, "loss": calibration.loss, "loss_before": last.before, "loss_after": last.best}
    if as_json:
        print_json(
            {"file": str(target), **values, "payload_bytes": saved.payload_bytes, "file_bytes": saved.file_bytes}
        )
        return
    rows = [
        ("steps", f"{last.step:,} of {steps:,}"),
        (f"loss ({calibration.loss}) before", number(last.before)),
        (f"loss ({calibration.loss}) after", number(last.best)),
        ("payload", f"{saved.payload_bytes:,} bytes"),
        ("file", f"{saved.file_bytes:,} bytes"),
    ]
    print_table(("", ""), rows)


def tell_end(watch: Watch, cache: Path) -> None:
    """Say why training ended before its last step, if it did."""
    last = watch.finetuning
    if last is None or last.step == last.steps:
        return
    why = "interrupted; the same command resumes it" if cache.exists() else "the loss stopped falling"
    say(f"fine-tuning ended after {last.step:,} of {last.steps:,} steps: {why}")
