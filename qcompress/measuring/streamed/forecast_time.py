"""Forecast of the time to measure an opened model, from one block and a few rows of its weights."""

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.streamed.sweep import temporary_sweep
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.steady import steady
from qcompress.transforms.base import Target, Weight

PASSES = 6.0  # forward passes of a block: one, one again, about three for the backward pass, one for single options
ROWS = 64  # rows of each layer's weight that are encoded for the forecast


def forecast_seconds(
    model: nn.Module, data: Iterable[Any], offered: Offered, forward: forwards.Forward | None = None
) -> float:
    """Forecast the seconds that `qcompress.measure` of an opened model takes, without moments and compensation.

    Args:
        model: an opened model.
        data: batches.
        offered: options by layer.
        forward: how to run a batch.
    """
    with temporary_sweep(model, data, steady(forward)) as sweep:
        opened = sweep.opened
        start = time.perf_counter()
        with opened.loaded(opened.blocks[0]) as block:
            reading_s = time.perf_counter() - start
            sweep.through(0, 0)  # the very first call is slower
            start = time.perf_counter()
            sweep.through(0, 0)
            passing_s = time.perf_counter() - start
            encoding_s = sum(
                _encoding_s(module, f"{opened.blocks[0]}.{path}", offered) for path, module in block.named_modules()
            )
    return len(opened.blocks) * (3 * reading_s + PASSES * len(sweep) * passing_s + encoding_s)


def _encoding_s(module: nn.Module, name: str, offered: Offered) -> float:
    """Return the seconds to encode a layer's options, extrapolated from some of its rows, rounded to nearest."""
    kind = layers.kind_of(module)
    if kind is None or layers.why_unsupported(module) or offered.left_out(name):
        return 0.0
    rows = layers.to_rows(module, layers.weight_of(module).detach())
    options = offered.options(name).uncalibrated()

    def encode(few: Tensor) -> None:
        target = Target(layer=kind.__name__, channels=len(few), per_channel=few.shape[1], dtype=few.dtype, macs=0.0)
        options.for_weight(Weight(few, target))

    encode(rows[:1])  # compiled on first use
    start = time.perf_counter()
    encode(rows[:ROWS])
    return (time.perf_counter() - start) * len(rows) / min(len(rows), ROWS)
