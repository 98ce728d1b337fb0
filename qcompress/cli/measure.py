"""``measure``: measure every option of every part and write the results to a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formulations.formatting import amount
from qcompress.cli import arguments
from qcompress.cli.console import print_json, print_table, say
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.forecast import tell_forecast
from qcompress.cli.language_model import TextFlags
from qcompress.cli.offering import OfferFlags
from qcompress.cli.progress import watching
from qcompress.cli.shared_flags import CalibrationFlags, MeasureFlags

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import Measurement


@with_flag_groups
def measure(
    calibration: CalibrationFlags,
    measuring: MeasureFlags,
    offer: OfferFlags,
    text: TextFlags,
    latency: Annotated[
        bool, typer.Option("--latency", help="Also time every option on the first batch, as the resource latency_s.")
    ] = False,
    output: Annotated[Path, arguments.output_option("The measurement file to write.")] = Path("measurement.npz"),
    as_json: arguments.AsJson = False,
) -> None:
    """Measure the effect of every option of every part on the loss. This is the expensive step; do it once.

    If a run is interrupted, the same command resumes it.

    Example: `qcompress measure zoo:resnet20 zoo:batches --method direct --output resnet20.npz`

    - rank, sparsity and bits as one choice: `… --low-rank --factor-bits 4,8`
    - a language model: `qcompress measure hf:FOLDER --text FILE`, block by block
    """
    import qcompress
    from qcompress import cautions
    from qcompress.model.forward import first_batch
    from qcompress.model.opened import opened_of

    options, settings = offer.options(), offer.arguments() | measuring.arguments() | calibration.arguments()
    by_block = not latency
    if language := text.language_model(calibration.model, calibration.data, measuring.method, by_block=by_block):
        (network, windows), batches = language, language[1].calibration
        settings |= text.arguments(measuring.method)
        tell_forecast(network, windows, offer, settings | {"options": options})
    else:
        network, batches = calibration.model_and_data()
    with watching("measuring") as watch:
        measurement = qcompress.measure(
            network,
            batches,
            options,
            cache=output.with_name(f"{output.name}.part"),
            on_progress=watch.measured,
            on_encode=watch.encoded,
            **settings,
        )
        if latency:
            measurement = qcompress.time_options(
                network, measurement, first_batch(batches), forward=settings["forward"], on_progress=watch.timed
            )
    measurement.save(output)
    opened = opened_of(network) is not None
    warnings = list(cautions.of_selections(measurement, cautions.what_helps(measurement, opened=opened, given=True)))
    say(f"wrote {output}")
    if as_json:
        print_json({"file": str(output), **_summary(measurement, warnings)})
    else:
        _print_summary(measurement, warnings)


def _summary(measurement: "Measurement", warnings: list[str]) -> dict[str, Any]:
    return {
        "parts": len(measurement.parts),
        "options": len(measurement.cost),
        "samples": measurement.num_samples,
        "original": dict(measurement.original),
        "skipped": {item.name: item.reason for item in measurement.unchanged},
        "tried": dict(measurement.tried),
        "notes": list(measurement.notes),
        "warnings": warnings,
    }


def _print_summary(measurement: "Measurement", warnings: list[str]) -> None:
    counts = {
        "parts": len(measurement.parts),
        "options": len(measurement.cost),
        "samples": measurement.num_samples,
    }
    rows = [(name, str(count)) for name, count in counts.items()]
    rows += [(f"original {name}", amount(value)) for name, value in measurement.original.items()]
    rows += [(f"left unchanged: {item.name}", item.reason) for item in measurement.unchanged]
    rows += [(f"measured option by option: {name}", reason) for name, reason in measurement.tried.items()]
    rows += [("note", note) for note in measurement.notes]
    rows += [("WARNING", text) for text in warnings]
    print_table(("", ""), rows)
