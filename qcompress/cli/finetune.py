"""``finetune``: train a compressed model file, to one of the same bytes."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import number, print_json, print_table, say
from qcompress.cli.progress import Watch, watching


def finetune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="package.module:callable that returns the original, the teacher.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="package.module:callable that returns the batches.")],
    small: Annotated[
        Path, typer.Argument(metavar="SMALL", help="A compressed model, as 'qcompress compress' or 'apply' write.")
    ],
    steps: Annotated[int, typer.Option(help="At most so many, one batch each.", min=1)] = 1000,
    learning_rate: Annotated[
        float, typer.Option(help="The highest: it rises over the first fifth of the steps, then falls.")
    ] = 3e-4,
    loss: arguments.Loss = "kl",
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Batches that the best weights are picked on. Default: the first four of DATA.",
        ),
    ] = None,
    forward: arguments.Forward = None,
    seed: arguments.Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: SMALL's name with .tuned.safetensors.")
    ] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Train a compressed model to meet the outputs of the original, MODEL, and write it in the same bytes.

    Needs no labels. It ends early when the loss no longer falls, and the loss is never higher than before. A run that
    was cut goes on where it was when the same command is given again; Ctrl-C takes the best so far.

    Example: `qcompress finetune zoo:resnet20 zoo:training runs/small/model.safetensors --steps 2000`
    """
    import qcompress

    make_model, make_data = arguments.function(model, "MODEL"), arguments.function(data, "DATA")
    target = small.with_suffix(".tuned.safetensors") if output is None else output
    looked_at = None if validation is None else arguments.function(validation, "--validation")()
    cache = target.with_name(f"{target.name}.part")
    with watching("fine-tuning") as watch:
        tuned = qcompress.finetune(
            qcompress.load_compressed(small, make_model),
            make_data(),
            steps,
            teacher=make_model(),
            loss=arguments.loss(loss),
            learning_rate=learning_rate,
            validation=looked_at,
            forward=arguments.forward(forward),
            seed=seed,
            cache=cache,
            on_progress=watch.finetuned,
        )
    saved = qcompress.save_compressed(tuned, target)
    tell_end(watch, cache)
    say(f"written: {target}")
    last = watch.finetuning
    assert last is not None  # noqa: S101  (told before the first step)
    if as_json:
        values = {"steps": last.step, "loss": loss, "loss_before": last.before, "loss_after": last.best}
        print_json(
            {"file": str(target), **values, "payload_bytes": saved.payload_bytes, "file_bytes": saved.file_bytes}
        )
        return
    rows = [
        ("steps", f"{last.step:,} of {steps:,}"),
        (f"loss ({loss}) before", number(last.before)),
        (f"loss ({loss}) after", number(last.best)),
        ("payload", f"{saved.payload_bytes:,} bytes"),
        ("file", f"{saved.file_bytes:,} bytes"),
    ]
    print_table(("", ""), rows)


def tell_end(watch: Watch, cache: Path) -> None:
    """A word where a training ended before its last step."""
    last = watch.finetuning
    if last is None or last.step == last.steps:
        return
    why = "interrupted; the same command goes on" if cache.exists() else "the loss no longer fell"
    say(f"fine-tuning ended after {last.step:,} of {last.steps:,} steps: {why}")
