"""From the changes of the outputs to costs and effects: the second-order form around where choices lead.

The Hessian of ``kl`` at the original's outputs says little of a choice that moves them far: a confident model has
next to no curvature there. As a choice's loss is the integral of the curvature along the way to it, the Hessian is
averaged over points on the way to choices that a solver may make, from mild to harsh: for prices per byte spread
over what the options ask, every part's cheapest option at that price; points ``reference + t·Σ J`` with t drawn evenly
in the integral's weights ``2·(1 - t)``. A mean of Gram matrices is a Gram matrix, so the factor form stays.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.losses import Loss

NUM_PRICES = 8
WAY = 1 - (1 - (np.arange(2) + 0.5) / 2) ** 0.5  # the middles of two halves of equal weight under 2·(1 - t)
MAX_NUMBERS = 1024  # outputs of up to this many numbers per sample have their changes kept in full


def option_costs(loss: Loss, changes: Tensor, reference: Tensor, batch: Any) -> NDArray[np.float64]:
    """``(V,)`` loss increase of every option alone, summed over the samples, for output changes ``(V, samples, …)``."""
    return np.array([float(loss.rise(reference + change, reference, batch).sum()) for change in changes])


def exact_effects(
    loss: Loss,
    changes: Tensor,
    reference: Tensor,
    batch: Any,
    cost: NDArray[np.float64],
    size_bytes: NDArray[np.float64],
    offsets: NDArray[np.int64],
) -> Iterator[NDArray[np.floating]]:
    """Blocks of effects ``(V, columns)`` whose Gram matrices add up to the second-order terms of the batch.

    Args:
        loss: what H is of.
        changes: ``(V, samples, …)`` change of the output by every option alone.
        reference: ``(samples, …)`` the original's outputs.
        batch: what they come from.
        cost: ``(V,)`` loss increase of every option alone.
        size_bytes: ``(V,)`` of every option.
        offsets: ``(G+1,)`` first option of every part; it keeps the part as it is.
    """
    points = [reference]
    if loss.curvature_varies:
        choices = likely_choices(cost, size_bytes, offsets)
        moves = [changes[torch.from_numpy(chosen)].sum(dim=0) for chosen in choices]
        points = [reference + float(t) * move for move in moves for t in WAY] or points
    for point in points:
        effects: NDArray[np.floating] = loss.effects(changes, point, batch).reshape(len(changes), -1).cpu().numpy()
        yield effects / len(points) ** 0.5


def likely_choices(
    cost: NDArray[np.float64], size_bytes: NDArray[np.float64], offsets: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Flat options of the choices that are cheapest at `NUM_PRICES` prices per byte, from mild to harsh.

    >>> likely_choices(np.array([0, 1, 9.0]), np.array([40, 20, 10.0]), np.array([0, 3]))[-1].tolist()
    [1]
    """
    starts = offsets[:-1]
    saved = np.repeat(size_bytes[starts], np.diff(offsets)) - size_bytes
    asked = np.maximum(cost[saved > 0], 0.0) / saved[saved > 0]
    if not len(asked):
        return []
    prices = np.quantile(asked, (np.arange(NUM_PRICES) + 0.5) / NUM_PRICES)
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    totals = [cost + price * size_bytes for price in prices]
    return [np.array([start + int(total[start:stop].argmin()) for start, stop in bounds]) for total in totals]
