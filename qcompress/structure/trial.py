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
from qcompress.model.coupled import CoupledSet

SAME = 1e-3
"""Tolerated difference of the outputs relative to the largest one: sums of other lengths round differently."""


def failing(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    batch: Any,
    forward: forwards.Forward | None = None,
    *,
    whole: bool = False,
    beside: Sequence[CoupledSet] = (),
) -> dict[str, str]:
    """For each set (by name) where removing units differs from masking them, the reason.

    Args:
        model: the model.
        sets: some of its sets.
        batch: a few samples.
        forward: how to run them.
        whole: whether to remove all units, in place of some.
        beside: other sets, of which half of the units are removed as well in a second trial of whole sets.
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
    reasons = (_why_not(model, [*sets, *beside], removed, batch, forward) for removed in removals)
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
            for name, reason in failing(model, part, batch, forward, whole=whole, beside=beside).items()
        }
        if at_fault:
            left = [item for item in sets if item.name not in at_fault]
            more = failing(model, left, batch, forward, whole=whole, beside=beside) if left else {}
            return {**at_fault, **more}
    return dict.fromkeys((item.name for item in sets), f"together with others: {why}")


def _why_not(
    model: nn.Module, sets: Sequence[CoupledSet], removed: Removed, batch: Any, forward: forwards.Forward | None
) -> str:
    masked = output_of(mask_(own_copy(model), sets, removed), batch, forward)
    try:
        smaller = output_of(remove_(own_copy(model), sets, removed), batch, forward)
    except Exception as error:
        return f"the model does not run without some units ({str(error).splitlines()[0] if str(error) else error!r})"
    if smaller.shape != masked.shape:
        return f"without some units the outputs have shape {tuple(smaller.shape)} instead of {tuple(masked.shape)}"
    difference = float((smaller - masked).abs().max())
    if not difference <= SAME * max(float(masked.abs().max()), 1e-30):  # it may be NaN
        return f"removing units gives other outputs than masking them (by {difference:.2g})"
    return ""


def output_of(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> Tensor:
    """Return the output in evaluation mode."""
    with forwards.evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        return forwards.run(model, batch, forward)
