"""Calls of layers that the first sample does not call, such as experts: counted over all samples, block by block."""

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompress.measuring.streamed.inputs import passes_of
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.counting import Calls, Counted, count
from qcompress.model.parts import UNCALLED, Survey


def others_call_more(sweep: BlockSweep, inventory: Survey) -> bool:
    """Whether samples after the first may call more of the model.

    Args:
        sweep: the samples.
        inventory: survey of the first sample.
    """
    uncalled = [item.name for item in inventory.skipped if item.reason == UNCALLED]
    if not uncalled or len(sweep) == 1:
        return False
    if any(sweep.opened.block_of(name) is not None for name in uncalled):
        return True
    first, all_samples = inventory.counted, count(sweep.model, *passes_of(sweep, None, around))
    return not (first.calls.keys() >= all_samples.calls.keys() and first.used >= all_samples.used)


def counted_by_block(sweep: BlockSweep, first: Counted) -> Counted:
    """Return the calls of all samples.

    Args:
        sweep: the samples, which have gone forward through all blocks.
        first: what is known from the first sample.
    """
    calls: dict[str, Calls] = {}
    used, selecting = set(first.used), dict.fromkeys(first.selecting)
    for block, path in [(None, ""), *enumerate(sweep.opened.blocks)]:
        with contextlib.nullcontext() if block is None else sweep.opened.loaded(path):
            unit = count(sweep.model.get_submodule(path), *passes_of(sweep, block))
        calls |= {_joined(path, name): of_layer for name, of_layer in unit.calls.items()}
        used |= {_joined(path, name) for name in unit.used}
        selecting |= {_joined(path, name): None for name in unit.selecting}
    before, after = (sum(of_layer.macs for of_layer in known.values()) for known in (first.calls, calls))
    return replace(
        first, calls=calls, used=frozenset(used), selecting=tuple(selecting), macs=first.macs + after - before
    )


def around(sweep: BlockSweep, sample: int) -> Tensor:
    """Return the model's output for a sample if its last block returns ones; no block is run."""
    return sweep.output(sample, torch.ones(sweep.shapes[sample], dtype=sweep.dtype))


def everything_around(sweep: BlockSweep, sample: int) -> Tensor:
    """Return all that the blocks are given, and `around`, as one row."""
    hidden, calls = sweep.chain.calls(sweep.samples[sample].inputs)
    values: list[Any] = [hidden, *(leaf for call in calls for leaf in call.leaves), around(sweep, sample)]
    return torch.cat([value.reshape(1, -1).float() for value in values if isinstance(value, Tensor)], dim=1)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
