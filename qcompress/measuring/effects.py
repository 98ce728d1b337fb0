"""From changes of the outputs to costs and effects: the second-order form in the region that choices lead to.

The Hessian of ``kl`` at the original's outputs says little about a choice that moves the outputs far: a confident model
has almost no curvature there. Since the loss of a choice is the integral of the curvature along the path to it, the
Hessian is averaged over points on the paths to choices that a solver may make, from mild to harsh: for several prices
per byte, spread over the options' own ratios of cost to bytes saved, every part's cheapest option at that price. The
points are ``reference + t·Σ J`` with t spread evenly under the integral's weights ``2·(1 - t)``. A mean of Gram
matrices is a Gram matrix, so the factor form is kept.
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
WAY = 1 - (1 - (np.arange(2) + 0.5) / 2) ** 0.5  # midpoints of two halves of equal weight under 2·(1 - t)
MAX_NUMBERS = 1024  # outputs with up to this many numbers per sample have their changes kept in full


def option_costs(
    loss: Loss, changes: Tensor, point: Tensor, batch: Any, reference: Tensor | None = None
) -> NDArray[np.float64]:
    """Return ``(V,)`` loss increase of every option alone, summed over the samples.

    Args:
        loss: the loss, relative to ``reference``.
        changes: ``(V, samples, …)`` changes of the outputs.
        point: ``(samples, …)`` outputs that the changes are added to.
        batch: the batch that the outputs belong to.
        reference: ``(samples, …)`` outputs of the original; by default ``point`` itself.
    """
    goal = point if reference is None else reference
    standing = 0.0 if reference is None else float(loss.rise(point, goal, batch).sum())
    return np.array([float(loss.rise(point + change, goal, batch).sum()) - standing for change in changes])


class Effects(NamedTuple):
    """Costs and effects of all options on one batch.

    Attributes:
        cost: ``(V,)`` loss increases of every option alone, summed over the samples.
        blocks: matrices ``(V, columns)`` whose Gram matrices add up to the second-order terms.
        num_samples: number of samples in the batch.
        softened: ``(V,)`` same as ``cost`` under the softened loss; None if the loss has none or the outputs have too
            many numbers to keep their changes.
        cost_squares: ``(V,)`` sums of the squared costs of all samples, if each has a column.
    """

    cost: NDArray[np.float64]
    blocks: Iterable[NDArray[np.floating]]
    num_samples: int
    softened: NDArray[np.float64] | None = None
    cost_squares: NDArray[np.float64] | None = None


def softened_costs(
    loss: Loss, changes: Tensor, point: Tensor, batch: Any, reference: Tensor | None = None
) -> NDArray[np.float64] | None:
    """Return `option_costs` under the softened loss, or None if there is none."""
    return None if loss.softened is None else option_costs(loss.softened, changes, point, batch, reference)


def exact_effects(loss: Loss, changes: Tensor, points: list[Tensor], batch: Any) -> Iterator[NDArray[np.floating]]:
    """Return matrices ``(V, columns)`` whose Gram matrices add up to the second-order terms of the batch.

    Args:
        loss: the loss whose Hessian is used.
        changes: ``(V, samples, …)`` change of the output by every option alone.
        points: outputs ``(samples, …)`` that the Hessian is averaged over.
        batch: the batch that the outputs belong to.
    """
    for point in points:
        effects: NDArray[np.floating] = loss.effects(changes, point, batch).reshape(len(changes), -1).cpu().numpy()
        yield effects / len(points) ** 0.5


def curvature_points(
    loss: Loss, changes: Tensor, reference: Tensor, cost: NDArray[np.float64], candidates: Candidates
) -> list[Tensor]:
    """Return outputs on the paths from ``reference`` to likely choices, by single options' ``cost`` and ``changes``."""
    if not loss.curvature_varies:
        return [reference]
    choices = likely_choices(cost, candidates.size_bytes, candidates.offsets)
    moves = [changes[torch.from_numpy(chosen)].sum(dim=0) for chosen in choices]
    return [reference + float(t) * move for move in moves for t in WAY] or [reference]


def likely_choices(
    cost: NDArray[np.float64], size_bytes: NDArray[np.float64], offsets: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Return choices (as flat options) that are cheapest at `NUM_PRICES` prices per byte, from mild to harsh.

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
