"""Print, before measuring starts, what it takes for a language model that is read block by block."""

from typing import TYPE_CHECKING, Any

from qcompress.cli.console import say
from qcompress.cli.offering import OfferFlags

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress.model.text import Windows


def tell_forecast(network: "nn.Module", windows: "Windows", offer: OfferFlags, settings: dict[str, Any]) -> None:
    """Print how much time and memory measuring will take; nothing for a model in memory.

    Args:
        network: the language model.
        windows: windows of its text.
        offer: flags about the options.
        settings: arguments of `qcompress.compress` or `qcompress.measure`.
    """
    from qcompress.measuring.options_by_layer import Offered
    from qcompress.measuring.streamed.forecast_memory import forecast_memory
    from qcompress.measuring.streamed.forecast_time import forecast_seconds
    from qcompress.model.losses import as_loss
    from qcompress.model.opened import opened_of

    if (opened := opened_of(network)) is None:
        return
    words, engine, forward = offer.arguments(), settings.get("target"), settings["forward"]
    options = settings.get("options") or (offer.options() if engine is None else engine.options())
    offered = Offered.of(options, skip=words.get("skip", ()), only=words.get("only"))
    sizes = [opened.block_bytes(path) for path in opened.blocks]
    needed = forecast_memory(network, windows.calibration[:1], offered, as_loss(settings["loss"]), forward)
    seconds = forecast_seconds(network, windows.calibration, offered, forward)
    say(
        f"{len(sizes)} blocks of {max(sizes) / 1e6:,.0f} MB, {len(windows.calibration)} windows of "
        f"{windows.calibration[0].shape[1]} tokens ({len(windows.validation)} more for validation, "
        f"{len(windows.test)} for testing): measuring takes about {seconds:,.0f} s and needs "
        f"about {needed / 1e9:.2g} GB of memory"
    )
