"""The grid of values that the weights of a row may take: whole codes times a scale, per row or per group."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The values that weights may take: scale times a whole number from ``low`` to ``high``, per group.

    Attributes:
        scales, low, high: ``(channels, groups)`` float32.
        group_size: weights of a row that share a scale; the last group of a row may be shorter.
        storable: function that rounds scales ``(channels,)`` to the nearest ones that can be written.
        numbers: ascending float32 array of the admissible codes; empty for all whole numbers from low to high.
    """

    scales: Tensor
    low: Tensor
    high: Tensor
    group_size: int
    storable: Callable[[Tensor], Tensor] = lambda scales: scales
    numbers: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    def __getitem__(self, rows: slice) -> "Grid":
        """Return the grid of some rows."""
        return replace(self, scales=self.scales[rows], low=self.low[rows], high=self.high[rows])

    def of_groups(self, groups: slice) -> "Grid":
        """Return the grid of some groups, all of full size."""
        return replace(self, scales=self.scales[:, groups], low=self.low[:, groups], high=self.high[:, groups])

    def of_size(self, sizes: Tensor) -> "Grid":
        """Return the grid for rows divided by ``sizes`` ``(channels,)``."""
        return replace(
            self, scales=self.scales / sizes[:, None], storable=lambda scales: self.storable(scales * sizes) / sizes
        )

    def spread(self, num_weights: int) -> Tensor:
        """Return the scale of every weight, ``(channels, num_weights)``."""
        return spread(self.scales, self.group_size, num_weights)


def in_groups(rows: Tensor, group_size: int) -> Tensor:
    """Return ``(channels, num_weights)`` as ``(channels, groups, group_size)``, the last group filled up with zeros."""
    missing = -rows.shape[1] % group_size
    return (pad(rows, (0, missing)) if missing else rows).view(len(rows), -1, group_size)


def spread(of_groups: Tensor, group_size: int, num_weights: int) -> Tensor:
    """Repeat a value per group, ``(channels, groups)``, for each of the group's weights, ``(channels, num_weights)``.

    >>> import torch
    >>> spread(torch.tensor([[1, 2]]), group_size=2, num_weights=3)
    tensor([[1, 1, 2]])
    """
    return of_groups.repeat_interleave(group_size, dim=1)[:, :num_weights]
