"""Test the traced sets: this reveals hard-coded sizes and anything else that tracing cannot see.

First one unit of every set is removed at once, then half of the units, then another share of every set, and the smaller
network is compared with the masked one. If they differ, or the smaller one does not run, the sets are bisected down to
those at fault. Those sets are reported and kept whole.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.copying import own_copy
from qcompress.compressed.removal import Removed, mask_, remove_
from qcompress.model import forward as forwards
from qcompress.model.alone import precision_of
from qcompress.model.coupled import CoupledSet

SAME = 1e-3
"""Tolerated difference of an output relative to its spread over samples and positions."""

ROUNDING_MULTIPLE = 100
"""Multiple of the number format's precision by which an output may differ relative to its largest value: rounding."""

FLOAT32 = torch.finfo(torch.float32).eps
"""Precision of the outputs that are compared, or coarser: that of the model."""

ENOUGH = 4
"""Number of values of an output from which their spread says how much it varies."""


def failing(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    batches: Sequence[Any],
    forward: forwards.Forward | None = None,
    *,
    whole: bool = False,
    beside: Sequence[CoupledSet] = (),
) -> dict[str, str]:
    """Return why removing units differs from masking them, for each set (by name) where it does.

    Args:
        model: the model.
        sets: some of its sets.
        batches: a few samples each.
        forward: how to run them.
        whole: whether to remove all units, in place of some.
        beside: other sets; half of their units are removed as well in a second trial of whole sets.
    """
    rng = np.random.default_rng(0)

    def half(some: Sequence[CoupledSet]) -> dict[str, NDArray[np.int64]]:
        return {item.name: rng.choice(item.num_units, item.num_units // 2, replace=False) for item in some}

    if whole:
        everything = {item.name: np.arange(item.num_units) for item in sets}
        removals: list[Removed] = [everything, *([{**half(beside), **everything}] if beside else [])]
    else:
        unequal = {item.name: rng.permutation(item.num_units)[rng.integers(1, item.num_units) :] for item in sets}
        removals = [{item.name: np.zeros(1, dtype=np.int64) for item in sets}, half(sets), unequal]
    reasons = (_why_not(model, [*sets, *beside], removed, batches, forward) for removed in removals)
    why = next(filter(None, reasons), "")
    if not why:
        return {}
    if len(sets) == 1:
        return {sets[0].name: why}
    middle = len(sets) // 2
    alone = [[item] for item in sets] if len(sets) > 2 else []
    for parts in ((sets[:middle], sets[middle:]), alone):
        at_fault = {
            name: reason
            for part in parts
            for name, reason in failing(model, part, batches, forward, whole=whole, beside=beside).items()
        }
        if at_fault:
            left = [item for item in sets if item.name not in at_fault]
            more = failing(model, left, batches, forward, whole=whole, beside=beside) if left else {}
            return {**at_fault, **more}
    return dict.fromkeys((item.name for item in sets), f"together with others: {why}")


def _why_not(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    removed: Removed,
    batches: Sequence[Any],
    forward: forwards.Forward | None,
) -> str:
    try:
        masked = _outputs(mask_(own_copy(model), sets, removed), batches, forward)
        smaller = _outputs(remove_(own_copy(model), sets, removed), batches, forward)
    except Exception as error:
        return f"the model does not run without some units ({str(error).splitlines()[0] if str(error) else error!r})"
    pairs = list(zip(smaller, masked, strict=True))
    precision = max(precision_of(model), FLOAT32)
    for found, expected in pairs:
        if found.shape != expected.shape:
            return f"without some units the outputs have shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    for shape in dict.fromkeys(expected.shape[1:] for expected in masked):
        alike = [pair for pair in pairs if pair[1].shape[1:] == shape]
        found, expected = (torch.cat(outputs) for outputs in zip(*alike, strict=True))
        difference = (found - expected).abs()
        if not bool((difference <= _tolerance(expected, precision)).all()):  # it may be NaN
            return f"removing units gives other outputs than masking them (by {float(difference.max()):.2g})"
    return ""


def _outputs(model: nn.Module, batches: Sequence[Any], forward: forwards.Forward | None) -> list[Tensor]:
    """Return the outputs for every batch; a single number is that of one sample."""
    outputs = [output_of(model, batch, forward).cpu() for batch in batches]
    return [output if output.ndim else output[None] for output in outputs]


def _tolerance(outputs: Tensor, precision: float = FLOAT32) -> Tensor:
    """Return the differences up to which outputs ``(samples, ...)`` of relative ``precision`` are the same.

    They are relative to what varies: a constant much larger than that, or another output, must not hide it.
    """
    values = outputs if outputs.is_floating_point() else outputs.float()
    sizes = values.abs()
    allowed = values.new_tensor(torch.inf)
    for dim in (None, *range(1, values.ndim)):
        others = [other for other in range(values.ndim) if other != dim]
        if dim is None or values.numel() >= ENOUGH * values.shape[dim]:
            largest = sizes.amax(others, keepdim=True)
            spread = values.std(others, correction=0, keepdim=True) if values.numel() > 1 else largest
            rounding = min(ROUNDING_MULTIPLE * precision, SAME) * largest
            allowed = torch.minimum(allowed, torch.maximum(SAME * spread, rounding))
    return torch.maximum(allowed, min(4 * precision, SAME) * sizes.max())  # rounding of what cancels to almost nothing


def output_of(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> Tensor:
    """Return the output in evaluation mode."""
    with forwards.evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        return forwards.run(model, batch, forward)
