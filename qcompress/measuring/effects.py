"""From the changes of the outputs to costs and effects: the second-order form around where choices lead.

The Hessian of ``kl`` at the original's outputs says little of a choice that moves them far: a confident model has
next to no curvature there. As a choice's loss is the integral of the curvature along the way to it, the Hessian is
averaged over points on the way to choices that a solver may make, from mild to harsh: for prices per byte spread
over what the options ask, every part's cheapest option at that price; points ``reference + t·Σ J`` with t drawn evenly
in the integral's weights ``2·(1 - t)``. A mean of Gram matrices is a Gram matrix, so the factor form stays.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.measuring.candidates import Candidates
from qcompress.model.losses import Loss

NUM_PRICES = 8
WAY = 1 - (1 - (np.arange(2) + 0.5) / 2) ** 0.5  # the middles of two halves of equal weight under 2·(1 - t)
MAX_NUMBERS = 1024  # outputs of up to this many numbers per sample have their changes kept in full


def option_costs(
    loss: Loss, changes: Tensor, point: Tensor, batch: Any, reference: Tensor | None = None
) -> NDArray[np.float64]:
    """``(V,)`` loss increase of every option alone, summed over the samples.

    Args:
        loss: relative to ``reference``, by default ``point`` itself.
        changes: ``(V, samples, …)`` of the outputs.
        point: ``(samples, …)`` outputs that they change.
        batch: what those come from.
        reference: ``(samples, …)`` outputs of the original.
    """
    goal = point if reference is None else reference
    standing = 0.0 if reference is None else float(loss.rise(point, goal, batch).sum())
    return np.array([float(loss.rise(point + change, goal, batch).sum()) - standing for change in changes])


class Effects(NamedTuple):
    """What a batch shows of all options.

    Attributes:
        cost: ``(V,)`` loss increases of every option alone, summed over the samples.
        blocks: ``(V, columns)`` each, whose products are the second-order terms.
        num_samples: in the batch.
        softened: ``(V,)`` as ``cost``, by the softened loss; None where that is no other or the outputs have too many
            numbers for their changes to be known.
    """

    cost: NDArray[np.float64]
    blocks: Iterable[NDArray[np.floating]]
    num_samples: int
    softened: NDArray[np.float64] | None = None


def softened_costs(
    loss: Loss, changes: Tensor, point: Tensor, batch: Any, reference: Tensor | None = None
) -> NDArray[np.float64] | None:
    """`option_costs` by the softened loss, where there is one."""
    return None if loss.softened is None else option_costs(loss.softened, changes, point, batch, reference)


def exact_effects(loss: Loss, changes: Tensor, points: list[Tensor], batch: Any) -> Iterator[NDArray[np.floating]]:
    """Blocks of effects ``(V, columns)`` whose Gram matrices add up to the second-order terms of the batch.

    Args:
        loss: what H is of.
        changes: ``(V, samples, …)`` change of the output by every option alone.
        points: outputs ``(samples, …)`` that H is averaged over.
        batch: what they come from.
    """
    for point in points:
        effects: NDArray[np.floating] = loss.effects(changes, point, batch).reshape(len(changes), -1).cpu().numpy()
        yield effects / len(points) ** 0.5


def curvature_points(
    loss: Loss, changes: Tensor, reference: Tensor, cost: NDArray[np.float64], candidates: Candidates
) -> list[Tensor]:
    """Outputs on the way from ``reference`` to likely choices; ``cost`` and ``changes`` are of every option alone."""
    if not loss.curvature_varies:
        return [reference]
    choices = likely_choices(cost, candidates.size_bytes, candidates.offsets)
    moves = [changes[torch.from_numpy(chosen)].sum(dim=0) for chosen in choices]
    return [reference + float(t) * move for move in moves for t in WAY] or [reference]


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
