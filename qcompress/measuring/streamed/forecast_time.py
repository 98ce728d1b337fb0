"""Forecast of the time to measure an opened model, from one block and a few rows of its weights."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.streamed.sweep import temporary_sweep
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.steady import steady
from qcompress.options import Options
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.column_blocks import MAX_INPUTS

PASSES = 7.0  # forward of a block: one, one for moments, one again, three for the backward pass, one for single options
COLUMNS = 256  # columns of what is encoded to compile kernels
ROWS = 64  # rows of each layer's weight that are encoded for the forecast


def forecast_seconds(
    model: nn.Module, data: Iterable[Any], offered: Offered, forward: forwards.Forward | None = None
) -> float:
    """Forecast the seconds that `qcompress.measure` of an opened model takes.

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
            encoding_s = _encoding_s(
                {f"{opened.blocks[0]}.{path}": each for path, each in block.named_modules()}, offered
            )
        outside = {path: each for path, each in model.named_modules() if opened.block_of(path) is None}
        outside_s = _encoding_s(outside, offered)
    return len(opened.blocks) * (3 * reading_s + PASSES * len(sweep) * passing_s + encoding_s) + outside_s


def _encoding_s(modules: Mapping[str, nn.Module], offered: Offered) -> float:
    """Return the seconds to encode the options of layers, each weight once, as that of its first layer."""
    weights: dict[int, tuple[str, nn.Module]] = {}
    for name, module in modules.items():
        if layers.kind_of(module) is not None and not layers.why_unsupported(module) and not offered.left_out(name):
            weights.setdefault(id(layers.weight_of(module)), (name, module))
    known: dict[tuple[Target, Options], Weight] = {}
    return sum(_layers_encoding_s(module, offered.options(name), known) for name, module in weights.values())


def _layers_encoding_s(module: nn.Module, options: Options, known: dict[tuple[Target, Options], Weight]) -> float:
    """Return the seconds to encode a layer's options, extrapolated from some of its rows.

    Compensation takes as long whatever the second moments are. Those of other layers than linear ones have other forms,
    and their options are rounded to nearest here.

    Args:
        module: the layer.
        options: its options.
        known: (target of a row, options) → a row with what depends on its inputs alone, which layers share; added to.
    """
    rows = layers.to_rows(module, layers.weight_of(module).detach())
    width, linear = rows.shape[1], isinstance(module, nn.Linear) or layers.has_inputs_first(module)
    whole = Target(
        layer=layers.kind_name(module), channels=len(rows), per_channel=width, dtype=rows.dtype, macs=0.0,
        common_input=linear,
    )  # fmt: skip
    calibrated = linear and width <= MAX_INPUTS and options.need_moments(whole)
    options = options if calibrated else options.uncalibrated()

    def row(columns: int) -> Weight:
        target = replace(whole, channels=1, per_channel=columns)
        return Weight(rows[:1, :columns], target, torch.eye(columns) if calibrated else None)

    def seconds(weight: Weight) -> float:
        start = time.perf_counter()
        options.for_weight(weight)
        return time.perf_counter() - start

    key, inputs_s = (replace(whole, channels=1), options), 0.0
    if key not in known:
        seconds(row(min(width, COLUMNS)))  # compiled on first use
        known[key] = row(width)
        inputs_s = seconds(known[key])
    few = rows[:ROWS]
    return inputs_s + seconds(known[key].block(few, replace(whole, channels=len(few)))) * len(rows) / len(few)
