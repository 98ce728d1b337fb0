"""``compress``: the whole way in one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import out, print_json, say
from qcompress.cli.explaining import explain
from qcompress.cli.export import engine_of
from qcompress.cli.finetune import tell_end
from qcompress.cli.offering import offering
from qcompress.cli.progress import watching

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import Options
    from qcompress.measuring.offered import Offered

FINETUNING = "Fine-tuning"
ENGINE = "Engine"


@offering
def compress(
    model: arguments.Model,
    data: arguments.Data,
    budget: arguments.Budgets,
    options: "Options | Offered",
    minimize: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Make this resource as small as can be with a predicted loss of at most --budget loss=0.02.",
        ),
    ] = None,
    solver: arguments.SolverName = "auto",
    time_limit: arguments.TimeLimit = 60.0,
    method: arguments.Method = "fisher",
    loss: arguments.Loss = "kl",
    granularity: arguments.Granularity = "layer",
    forward: arguments.Forward = None,
    pairs: Annotated[bool, typer.Option(help="With the terms between different parts.")] = True,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Batches that nothing is fitted to, to check choices on. Default: a quarter of DATA, kept aside.",
        ),
    ] = None,
    guard: Annotated[
        bool, typer.Option(help="Try several choices on the samples kept aside, and take the best of them.")
    ] = True,
    batch_norm: Annotated[bool, typer.Option(help="Re-estimate batch-norm statistics on DATA afterwards.")] = False,
    refine_rounds: Annotated[
        int,
        typer.Option(
            help="After the choice, measure again around it and choose again by true loss: at most so many rounds, "
            "each of about the time of the first measurement.",
            min=0,
        ),
    ] = 0,
    finetune_steps: Annotated[
        int,
        typer.Option(
            help="Train on DATA after the choice, to meet the original's outputs in the same bytes: at most so many "
            "steps, fewer when the loss no longer falls.",
            min=0,
            rich_help_panel=FINETUNING,
        ),
    ] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest. Default: 3e-4.", rich_help_panel=FINETUNING)
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:CALLABLE", help="model -> float, reported before and after."),
    ] = None,
    seed: arguments.Seed = 0,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="An engine to compress for: only what it runs is on offer, file_bytes=… is a budget, and its file "
            "goes to --output. 'qcompress engines' lists them.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A setting of the engine. May be given several times.", rich_help_panel=ENGINE
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for everything. Default: runs/NAME of the model. With --target the engine's file, and "
            "everything else in runs/NAME.",
        ),
    ] = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Compress a model to a budget: measure, formulate, solve, apply, save, report; refine and fine-tune if asked to.

    Leaves a folder with measurement.npz, problem.npz, solution.json, model.safetensors, report.json and summary.md.
    A run that was cut goes on where it was when the same command is given again. Ctrl-C while solving or fine-tuning
    takes the best so far.

    Example: `qcompress compress zoo:resnet20 zoo:batches --budget bytes=0.15 --output runs/small`

    - fewer bits: `… --bits 3,4,8 --sparsity 0`
    - only low rank: `… --budget macs=0.5 --no-prune-quantize --low-rank`
    - faster, by the options' own times on the first batch: `… --budget latency_s=0.8 --low-rank`
    - chosen ranks: `… --ranks 8,16 --kinds spatial,tucker` or `… --energies 0.9,0.99 --whitened`
    - rank, sparsity and bits as one choice: `… --low-rank --factor-bits 4,8 --factor-sparsity 0,0.5`
    - tight budgets, where predictions are poor: `… --refine-rounds 2`
    - for an engine: `… --target llama.cpp --budget file_bytes=90MB --output small.gguf`
    - as few bytes as a loss allows: `… --minimize bytes --budget loss=0.02`
    - trained after the choice: `… --finetune-steps 1000`; on other data than DATA: `qcompress finetune`
    """
    import qcompress
    from formulations import InfeasibleBudgetError
    from qcompress.compression import NoChoiceError
    from qcompress.training.finetune import LEARNING_RATE

    folder = Path("runs") / model.rpartition(":")[2] if output is None or target is not None else output
    limits = arguments.budgets(budget)
    if learning_rate is not None and not finetune_steps:
        raise typer.BadParameter("--learning-rate is for fine-tuning, as --finetune-steps 1000 --learning-rate 1e-3.")
    if setting and target is None:
        raise typer.BadParameter("--setting is for an engine, as --target llama.cpp --setting threads=2.")
    engine = None if target is None else engine_of(target, setting)
    unasked = engine is not None and options == qcompress.prune_quantize(compensated=True)  # what no words put on offer
    make_model, make_data = arguments.function(model, "MODEL"), arguments.function(data, "DATA")
    batches = make_data()
    try:
        with watching("measuring") as watch:
            result = qcompress.compress(
                make_model(),
                batches,
                budget=limits,
                minimize=minimize,
                options=None if unasked else options,
                solver=solver,
                time_limit=time_limit,
                seed=seed,
                method=method,
                loss=arguments.loss(loss),
                forward=arguments.forward(forward),
                granularity=arguments.granularity(granularity),
                pairs=pairs,
                validation=None if validation is None else arguments.function(validation, "--validation")(),
                guard=guard,
                batch_norm_data=batches if batch_norm else None,
                refine_rounds=refine_rounds,
                finetune_steps=finetune_steps,
                learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
                target=engine,
                output=None if engine is None else output,
                evaluate=None if evaluate is None else arguments.function(evaluate, "--evaluate"),
                folder=folder,
                on_encode=watch.encoded,
                on_measure=watch.measured,
                on_timing=watch.timed,
                on_progress=watch.solved,
                on_round=watch.refined,
                on_finetune=watch.finetuned,
            )
    except (InfeasibleBudgetError, NoChoiceError) as error:
        if error.problem is not None:
            explain(error.problem, as_json=as_json)
        raise
    if result.exported is not None:
        say(f"written: {result.exported.path} ({result.exported.size_bytes:,} bytes), run and compared")
    tell_end(watch, folder / "finetune.part")
    for warning in result.report.warnings:
        say(f"WARNING: {warning}")
    say(f"written to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    if as_json:
        print_json({"folder": str(folder), **result.report.to_json()})
        return
    from rich.markdown import Markdown

    out.print(Markdown(result.report.to_markdown()))
