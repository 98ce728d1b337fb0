"""From the changes of the outputs to costs and effects: the second-order form around where choices lead.

The Hessian of ``kl`` at the original's outputs says little of a choice that moves them far: a confident model has
next to no curvature there. As a choice's loss is the integral of the curvature along the way to it, the Hessian is
averaged over points on the way to random choices: ``reference + t·Σ_g J(random option of g)``, t up to `REACH`, in the
integral's weights ``2·(1 - t)``. The mean of Gram matrices is a Gram matrix, so the factor form stays.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.losses import Loss

DRAWS = 8
REACH = 0.5
MAX_NUMBERS = 1024  # outputs of up to this many numbers per sample have their changes kept in full


def option_costs(loss: Loss, changes: Tensor, reference: Tensor, batch: Any) -> NDArray[np.float64]:
    """``(V,)`` loss increase of every option alone, summed over the samples, for output changes ``(V, samples, …)``."""
    return np.array([float(loss.rise(reference + change, reference, batch).sum()) for change in changes])


def exact_effects(
    loss: Loss, changes: Tensor, reference: Tensor, batch: Any, offsets: NDArray[np.int64], generator: torch.Generator
) -> Iterator[NDArray[np.floating]]:
    """Blocks of effects ``(V, columns)`` whose Gram matrices add up to the second-order terms of the batch."""
    if not loss.curvature_varies:
        yield _columns(loss.effects(changes, reference, batch))
        return
    starts, sizes = torch.from_numpy(offsets[:-1]), torch.from_numpy(np.diff(offsets))
    for draw in range(DRAWS):
        share = REACH * (1 - (1 - (draw + 0.5) / DRAWS) ** 0.5)
        chosen = starts + (torch.rand(len(sizes), generator=generator) * sizes).long()
        point = reference + share * changes[chosen.to(changes.device)].sum(dim=0)
        yield _columns(loss.effects(changes, point, batch)) / DRAWS**0.5


def _columns(effects: Tensor) -> NDArray[np.floating]:
    columns: NDArray[np.floating] = effects.reshape(len(effects), -1).cpu().numpy()
    return columns
