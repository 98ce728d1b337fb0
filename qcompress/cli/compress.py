"""``compress``: all steps in one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import arguments
from qcompress.cli.console import out, print_json, say
from qcompress.cli.explaining import explain
from qcompress.cli.finetune import tell_end
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.forecast import tell_forecast
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
    from torch import Tensor, nn

    from qcompress import Engine, Result

ResultsOrFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder for all results. Default: runs/NAME, with the model's name. With --target, this is the "
        "engine's file, and all other results go to --folder.",
    ),
]
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
    output: ResultsOrFile = None,
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
    from solvers import NoChoiceError

    choice.require_context(target.target)
    engine = target.engine()
    results = _folder_for_results(calibration.model, output, folder, engine)
    settings: dict[str, Any] = {
        "options": None if offer.are_default() else offer.options(),
        "evaluate": None if evaluate is None else arguments.function(evaluate, "--evaluate"),
        "target": engine,
        "output": None if engine is None else output,
        "folder": results,
    }
    for flags in (offer, training, measuring, calibration, choice):
        settings |= flags.arguments()
    if language := _language_model(calibration, measuring, offer, text, settings):
        network, batches, more = language
        settings |= more
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


def _folder_for_results(model: str, output: Path | None, folder: Path | None, engine: "Engine | None") -> Path:
    """Return the folder of the run; print what it holds if that is for another engine's file.

    Raises:
        typer.BadParameter: a folder without an engine, where --output is the folder.
        EngineError, FileNotFoundError: the engine's file cannot be written there.
    """
    from qcompress.engines.export import require_free
    from qcompress.run_folder import has_written, output_of

    targeted = engine is not None
    if folder is not None:
        if not targeted:
            raise typer.BadParameter("--folder is for --target; without an engine, --output is the folder.")
    elif output is None or targeted:
        folder = Path("runs") / Path(model.rpartition(":")[2]).name
    else:
        folder = output
    if engine is not None and output is not None:
        require_free(engine, output, own=has_written(folder, output))
    earlier = output_of(folder)
    if earlier is not None and (output is None or output.resolve() != earlier):
        say(
            f"WARNING: {folder} holds the results for {earlier}. If this run makes another choice, it replaces them, "
            f"and 'qcompress verify' then finds no model for that file. To keep them, name another folder with "
            f"{'--folder' if targeted else '--output'}"
        )
    return folder


def _language_model(
    calibration: CalibrationFlags, measuring: MeasureFlags, offer: OfferFlags, text: TextFlags, settings: dict[str, Any]
) -> "tuple[nn.Module, list[Tensor], dict[str, Any]] | None":
    """Return a language model, the batches of its text and the arguments that follow from it, and print a forecast.

    None for any other MODEL.
    """
    from functools import partial

    from qcompress.measuring.perplexity import perplexity

    engine = settings["target"]
    by_block = engine is None or engine.opens_by_itself or (engine.by_block and text.memory is not None)
    language = text.language_model(calibration.model, calibration.data, measuring.method, by_block=by_block)
    if language is None:
        return None
    network, windows = language
    tell_forecast(network, windows, offer, settings)
    more = {
        **text.arguments(measuring.method),
        "validation": settings["validation"] or windows.validation,
        "evaluate": settings["evaluate"] or partial(perplexity, windows=windows.test),
    }
    return network, windows.calibration, more


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
