"""Memory that an opened model's measurement needs: its parts are found by passes, then counted.

One sample's pass finds the parts, unless it leaves layers uncalled that others may call: then all samples pass forward
through the blocks first. What a pass takes is counted on one block of each kind
(`qcompress.measuring.streamed.pass_memory`).

`qcompress.measuring.streamed.forecast` has the constants.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.measuring.memory import return_free_memory
from qcompress.measuring.options_by_layer import Offered, calibrated_options
from qcompress.measuring.streamed.calls import counted_by_block, everything_around, others_call_more
from qcompress.measuring.streamed.forecast import UnitForecast, forecast_of, needed_bytes, resident_bytes, stored_bytes
from qcompress.measuring.streamed.inputs import passes_of
from qcompress.measuring.streamed.pass_memory import pass_bytes
from qcompress.measuring.streamed.sweep import BlockSweep, temporary_sweep
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss
from qcompress.model.parts import Part, Survey, survey
from qcompress.model.steady import steady
from qcompress.options import Options


def forecast_memory(
    model: nn.Module, data: Iterable[Any], offered: Offered, loss: Loss, forward: forwards.Forward | None = None
) -> int:
    """Return the approximate bytes of memory that a process needs to measure an opened model.

    Args:
        model: an opened model.
        data: batches, of which the largest samples count.
        offered: options by layer.
        loss: the loss.
        forward: how to run a batch.
    """
    run = steady(forward)
    with forwards.layer_by_layer(), temporary_sweep(model, data, run) as sweep, torch.enable_grad():
        inventory, output = surveyed(sweep, run, offered, loss)
        options, _ = calibrated_options(inventory.parts, offered)
        return needed_bytes(resident_bytes(), unit_forecasts(sweep, inventory.parts, options, output))


def surveyed(sweep: BlockSweep, run: forwards.Forward, offered: Offered, loss: Loss) -> tuple[Survey, Tensor]:
    """Return the parts of a sweep's model, and its output for the first sample.

    One pass of the first sample finds them, unless that leaves layers uncalled which later samples may call.
    """
    outputs: list[Tensor] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        outputs.append(forwards.run(model, batch, run))
        return outputs[-1]

    inventory = survey(sweep.model, [sweep.samples[0].inputs], watched, loss=loss, left_out=offered.left_out)
    if others_call_more(sweep, inventory):
        for _ in sweep.forward():
            pass
        counted, outside = counted_by_block(sweep, inventory.counted), passes_of(sweep, None, everything_around)
        inventory = survey(sweep.model, *outside, counted=counted, left_out=offered.left_out)
    return inventory, outputs[0]


def unit_forecasts(
    sweep: BlockSweep,
    parts: Sequence[Part],
    options: Mapping[str, Options],
    output: Tensor,
    limit: int | None = None,
) -> list[UnitForecast]:
    """Return the memory forecasts of every block and of everything outside the blocks.

    Args:
        sweep: the samples.
        parts: the parts of its model.
        options: options on offer, by part name.
        output: the model's output for the first sample.
        limit: bytes of the process that are too many, at which the forecast may stop.
    """
    tokens = max(shape[:-1].numel() for shape in sweep.shapes)
    itemsize = sweep.dtype.itemsize
    of_block: dict[int | None, list[Part]] = {}
    for part in parts:
        of_block.setdefault(sweep.opened.block_of(part.modules[0]), []).append(part)
    outside = of_block.get(None, [])
    numbers = output.numel() * tokens // sweep.shapes[0][:-1].numel()
    around = forecast_of("everything outside the blocks", 0, outside, options, 8 * 4 * numbers)
    # options outside the blocks that are run alone: codes of all, and one of them decoded
    beside = stored_bytes(outside, options) + max((part.target.dense_bytes for part in outside), default=0)
    forecasts: list[UnitForecast] = []
    passes: dict[object, tuple[int, bool]] = {}
    for block, path in enumerate(sweep.opened.blocks):
        block_parts = of_block.get(block, [])
        through = sum(part.target.per_channel + part.target.channels for part in block_parts)
        weights, passing = sweep.opened.block_bytes(path), 4 * tokens * through * itemsize
        forecast = forecast_of(f"block {path!r}", weights, block_parts, options, passing, beside)
        if (kind := _kind(sweep.model.get_submodule(path))) not in passes:
            most = math.inf if limit is None else limit - needed_bytes(resident_bytes(), [forecast]) + forecast.working
            passes[kind] = pass_bytes(sweep, block, block_parts, max(most, passing))
            return_free_memory()
        counted, stopped = passes[kind]
        forecast = forecast_of(f"block {path!r}", weights, block_parts, options, max(passing, counted), beside)
        forecasts.append(dataclasses.replace(forecast, at_least=stopped))
    return [*forecasts, around]


def _kind(block: nn.Module) -> object:
    """Return what blocks that take the same memory have in common."""
    return type(block), tuple((name, own.shape, own.dtype) for name, own in block.named_parameters())
