"""``compress``: all steps in one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments
from qcompress.cli.console import out, print_json, say
from qcompress.cli.explaining import explain
from qcompress.cli.finetune import tell_end
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.language_model import TextFlags
from qcompress.cli.offering import OfferFlags
from qcompress.cli.progress import watching
from qcompress.cli.shared_flags import (
    ENGINE,
    CalibrationFlags,
    ChoiceFlags,
    EngineFlags,
    MeasureFlags,
    TrainingFlags,
)

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress import Result
    from qcompress.model.opened import Opened
    from qcompress.model.text import Windows

ResultsFolder = Annotated[
    Path | None,
    typer.Option(
        help="With --target: folder for all results besides the engine's file. Default: runs/NAME. Another run in the "
        "same folder reuses the measurement and replaces the results, with the engine's folder that it wrote.",
        rich_help_panel=ENGINE,
    ),
]


@with_flag_groups
def compress(
    choice: ChoiceFlags,
    measuring: MeasureFlags,
    calibration: CalibrationFlags,
    offer: OfferFlags,
    training: TrainingFlags,
    target: EngineFlags,
    text: TextFlags,
    batch_norm: Annotated[bool, typer.Option(help="Re-estimate batch-norm statistics on DATA afterwards.")] = False,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar=arguments.CALLABLE, help="Metric: model -> float, reported before and after compression."),
    ] = None,
    output: Annotated[
        Path | None,
        arguments.output_option(
            "Folder for all results. Default: runs/NAME, with the model's name. With --target, this is the engine's "
            "file, and all other results go to --folder."
        ),
    ] = None,
    folder: ResultsFolder = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Compress a model to a budget: measure, formulate, solve, apply, save and report.

    Writes a folder with measurement.npz, problem.npz, solution.json, model.safetensors, report.json and summary.md.
    If a run is interrupted, the same command resumes it. Ctrl-C while solving or fine-tuning keeps the best so far.

    Example: `qcompress compress zoo:resnet20 zoo:batches --budget bytes=0.15 --output runs/small`

    - fewer bits: `… --bits 3,4,8 --sparsity 0`
    - only low rank: `… --budget macs=0.5 --no-prune-quantize --low-rank`
    - faster, with every option timed on the first batch: `… --budget latency_s=0.8 --low-rank`
    - specific ranks: `… --ranks 8,16 --kinds spatial,tucker` or `… --energies 0.9,0.99 --whitened`
    - rank, sparsity and bits as one choice: `… --low-rank --factor-bits 4,8 --factor-sparsity 0,0.5`
    - tight budgets, where predictions are inaccurate: `… --refine-rounds 2`
    - for an engine: `… --target llama.cpp --budget file_bytes=90MB --output small.gguf`
    - for a memory: `… --target llama.cpp --budget memory=2GB --context 4096`
    - the fewest bytes within a loss: `… --minimize bytes --budget loss=0.02`
    - a language model: `compress hf:FOLDER --text FILE -b bits_per_weight=4`, or `compress gguf:FILE --text FILE …`
    - fine-tuned after the choice: `… --finetune-steps 1000`; on other data than DATA: `qcompress finetune`
    """
    import qcompress
    from formulations import InfeasibleBudgetError
    from qcompress.compression import NoChoiceError

    choice.require_context(target.target)
    engine = target.engine()
    results = _folder_for_results(calibration.model, output, folder, targeted=engine is not None)
    settings: dict[str, Any] = {
        "options": None if offer.are_default() else offer.options(),
        "evaluate": None if evaluate is None else arguments.function(evaluate, "--evaluate"),
        "target": engine,
        "output": None if engine is None else output,
        "folder": results,
    }
    for flags in (offer, training, measuring, calibration, choice):
        settings |= flags.arguments()
    if language := text.language_model(calibration.model, calibration.data, by_block=engine is None or engine.by_block):
        network, batches = language[0], language[1].calibration
        settings |= _for_language_model(*language, text, offer, settings)
    else:
        network, batches = calibration.model_and_data()
    settings["budget"] = choice.within_memory(settings["budget"], network)
    try:
        with watching("measuring") as watch:
            result = qcompress.compress(
                network,
                batches,
                batch_norm_data=batches if batch_norm else None,
                **watch.callbacks(),
                **settings,
            )
    except (InfeasibleBudgetError, NoChoiceError) as error:
        if error.problem is not None:
            explain(error.problem, as_json=as_json)
        raise
    tell_end(watch, results / "finetune.part")
    _print_result(result, results, target=target.target, as_json=as_json)


def _folder_for_results(model: str, output: Path | None, folder: Path | None, *, targeted: bool) -> Path:
    """Return the folder of the run, and say whose results it holds if they are for another engine's file.

    Raises:
        typer.BadParameter: a folder without an engine, where --output is the folder.
    """
    from qcompress.run_folder import output_of

    if folder is not None:
        if not targeted:
            raise typer.BadParameter("--folder is for --target; without an engine, --output is the folder.")
    elif output is None or targeted:
        folder = Path("runs") / Path(model.rpartition(":")[2]).name
    else:
        folder = output
    earlier = output_of(folder)
    if earlier is not None and (output is None or output.resolve() != earlier):
        say(
            f"WARNING: {folder} holds the results for {earlier}. If this run makes another choice, it replaces them, "
            f"and 'qcompress verify' then finds no model for that file. To keep them, name another folder with "
            f"{'--folder' if targeted else '--output'}"
        )
    return folder


def _for_language_model(
    network: "nn.Module", windows: "Windows", text: TextFlags, offer: OfferFlags, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments that follow from a language model's text; for an opened model, print a forecast."""
    from functools import partial

    from qcompress.measuring.perplexity import perplexity
    from qcompress.model.opened import opened_of

    if (opened := opened_of(network)) is not None:
        _forecast(network, opened, windows, text, offer, settings)
    return {
        "method": "sampled",
        "memory": text.memory,
        "validation": settings["validation"] or windows.validation,
        "evaluate": settings["evaluate"] or partial(perplexity, windows=windows.test),
    }


def _forecast(
    network: "nn.Module",
    opened: "Opened",
    windows: "Windows",
    text: TextFlags,
    offer: OfferFlags,
    settings: dict[str, Any],
) -> None:
    """Print how long measuring will take."""
    from qcompress.measuring.options_by_layer import Offered
    from qcompress.measuring.streamed.forecast_time import forecast_seconds

    words, engine = offer.arguments(), settings["target"]
    options = settings["options"] or (offer.options() if engine is None else engine.options())
    offered = Offered.of(options, skip=words.get("skip", ()), only=words.get("only"))
    sizes = [opened.block_bytes(path) for path in opened.blocks]
    seconds = forecast_seconds(network, windows.calibration, offered)
    say(
        f"{len(sizes)} blocks of {max(sizes) / 1e6:,.0f} MB, {len(windows.calibration)} windows of {text.length} "
        f"tokens ({len(windows.validation)} more for validation, {len(windows.test)} for testing): measuring takes "
        f"about {seconds:,.0f} s, longer with compensated codes"
    )


def _tell_files(folder: Path) -> None:
    """Say which files are of this run, and which of an earlier one in the same folder."""
    from qcompress.run_folder import JOURNAL, REPLACED, REUSED, RunFolder

    files = {JOURNAL: "", **RunFolder(folder).last_files}
    named: dict[str, list[str]] = {
        f"wrote to {folder}": [name for name, how in files.items() if how != REUSED],
        "replaced, of an earlier run": [name for name, how in files.items() if how == REPLACED],
        "reused from an earlier run": [name for name, how in files.items() if how == REUSED],
        "left from an earlier run, not brought up to date": [
            file.name for file in folder.iterdir() if file.name not in files
        ],
    }
    for what, names in named.items():
        if names:
            say(f"{what}: {', '.join(sorted(names))}")


def _print_result(result: "Result", folder: Path, *, target: str | None, as_json: bool) -> None:
    if result.exported is not None:
        say(f"wrote {result.exported.path} ({result.exported.size_bytes:,} bytes), ran it and compared its outputs")
    elif target is not None:
        say(
            f"WARNING: no file for {target} was written, and nothing was verified: the same command with --output "
            "writes and verifies it, reusing all results"
        )
    for warning in result.report.warnings:
        say(f"WARNING: {warning}")
    _tell_files(folder)
    if as_json:
        print_json({"folder": str(folder), **result.report.to_json()})
        return
    from rich.markdown import Markdown

    out.print(Markdown(result.report.to_markdown()))
