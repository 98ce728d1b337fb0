"""Inputs of the layers of a unit of an opened model: the moments and squares that its options are fitted to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.inputs.squares import input_squares
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.forward import Forward
from qcompress.model.parts import Part
from qcompress.transforms.base import Offer

Inputs = tuple[dict[str, Tensor], dict[str, int], dict[str, Tensor]]


def inputs_of(
    model: nn.Module,
    sweep: BlockSweep | None,
    block: int | None,
    parts: Sequence[Part],
    offers: Mapping[str, Sequence[Offer]],
) -> Inputs:
    """Return the moments, numbers of inputs, and squares, in the form that `qcompress.model.parts.weights_of` expects.

    Args:
        model: an opened model with the parts' weights in memory.
        sweep: a sweep that has gone forward through all blocks; None if nothing is fitted to inputs.
        block: index of the block that the parts are in, None for those outside the blocks.
        parts: parts of the model.
        offers: offers to encode, by part name.
    """
    calibrated = [part for part in parts if any(offer.needs_moments(part.target) for offer in offers[part.name])]
    weighed = [part for part in parts if any(offer.needs_squares(part.target) for offer in offers[part.name])]
    if sweep is None or not (calibrated or weighed):
        return {}, {}, {}
    data, run = passes_of(sweep, block)
    moments, num_inputs = second_moments(model, calibrated, data, run) if calibrated else ({}, {})
    squares = input_squares(model, weighed, data, run) if weighed else {}
    return moments, num_inputs, squares


def passes_of(
    sweep: BlockSweep, block: int | None, outside: Callable[[BlockSweep, int], Tensor] = BlockSweep.output
) -> tuple[list[Any], Forward]:
    """Return the samples, and the function that runs a sample through a block.

    Args:
        sweep: a sweep that has gone forward.
        block: index of the block, whose weights are in memory; None for everything outside the blocks.
        outside: function of the sweep and the index of a sample; runs what is outside the blocks.
    """
    data = [sample.inputs for sample in sweep.samples]
    numbers = {id(inputs): number for number, inputs in enumerate(data)}

    def run(_: nn.Module, inputs: Any) -> Tensor:
        number = numbers[id(inputs)]
        return outside(sweep, number) if block is None else sweep.through(block, number)

    run.keeps_batches = True  # type: ignore[attr-defined]  # a batch is recognised by its identity
    return data, run
