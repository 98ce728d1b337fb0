"""Least squares for one layer, from sums over its inputs and its wanted outputs.

A ridge term keeps weights that hardly affect the outputs close to their values. It is chosen by cross-validation, by
the error on other samples of a fit to most of them.

Least squares makes outputs vary less than the wanted ones, the more so the less the inputs determine them. Norms and
activations that follow expect the original's spread; networks with a restored spread lose less (arXiv 2211.08403).
Every layer but the last is therefore scaled, halfway between least squares and the original's spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompress.compressed.reconstruction import DAMPINGS

CONSTANT = 1e-5
"""Share of the squares of its terms below which a variance is rounding: the channel is constant, and is not scaled."""

MOST_WIDENED = 4.0
"""Largest factor between two variances of a channel that scaling compensates."""


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass(slots=True)
class LayerSums:
    """Sums over inputs x and wanted outputs y of a layer with groups: ``(groups, n)`` and ``(groups, channels)``."""

    count: int = 0
    inputs: Tensor = field(default_factory=_zero)
    outputs: Tensor = field(default_factory=_zero)
    moments: Tensor = field(default_factory=_zero)  # (groups, n, n) of x·xᵀ
    cross: Tensor = field(default_factory=_zero)  # (groups, channels, n) of y·xᵀ
    squares: Tensor = field(default_factory=_zero)  # (groups, channels) of y²

    def add(self, rows: Tensor, goal: Tensor) -> None:
        """Add a batch: ``(groups, positions, n)`` and ``(groups, positions, channels)``."""
        self.count += rows.shape[1]
        self.inputs = self.inputs + rows.double().sum(1)
        self.outputs = self.outputs + goal.double().sum(1)
        self.moments = self.moments + (rows.mT @ rows).double()
        self.cross = self.cross + (goal.mT @ rows).double()
        self.squares = self.squares + goal.double().square().sum(1)

    def together(self, *others: "LayerSums") -> "LayerSums":
        """Return the sums over all these samples."""
        return LayerSums(*(sum(getattr(own, name) for own in (self, *others)) for name in self.__slots__))

    def without(self, other: "LayerSums") -> "LayerSums":
        """Return the sums over those of the samples that are not in ``other``."""
        return LayerSums(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))

    def ridge(self, before: Tensor, damping: float) -> Tensor:
        """Return the weight of least squares with a ridge term towards ``before``."""
        added = damping * self.moments.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True) + 1e-30
        held = self.moments + torch.diag_embed(added.expand(-1, self.moments.shape[1]))
        change: Tensor = torch.linalg.solve(held, (self.cross - before @ self.moments).mT).mT
        return before + change

    def error(self, weight: Tensor) -> float:
        """Return the squared error of the outputs, up to a constant."""
        return float(((weight @ self.moments - 2 * self.cross) * weight).sum())

    def widened(self, weight: Tensor) -> Tensor:
        """Return the weight scaled by channel, to the geometric mean of the actual and the wanted spread of outputs."""
        mean = (weight @ self.inputs[..., None])[..., 0] / self.count
        own = ((weight @ self.moments) * weight).sum(-1) / self.count - mean.square()
        wanted = self.squares / self.count - (self.outputs / self.count).square()
        terms = self.squares + (weight.square() * self.moments.diagonal(dim1=1, dim2=2)[:, None]).sum(-1)
        rounding = CONSTANT * terms / self.count + 1e-30
        ratio = ((wanted + rounding) / (own + rounding)).clamp(1 / MOST_WIDENED, MOST_WIDENED)
        return weight * ratio[..., None] ** 0.25


def fitted(before: Tensor, folds: Sequence[LayerSums], *, last: bool) -> Tensor:
    """Return the fitted weight, with the ridge term that is best on samples not fitted to; or ``before`` if none is.

    A layer may have more inputs than the data has independent samples: then its own error means little.
    """
    reached = [fold for fold in folds if fold.count]
    if not reached:
        return before
    whole = reached[0].together(*reached[1:])
    if len(reached) < 2:  # a single sample
        after = whole.ridge(before, DAMPINGS[0])
    else:
        errors = {
            damping: sum(fold.error(whole.without(fold).ridge(before, damping)) for fold in reached)
            for damping in DAMPINGS
        }
        best = min(DAMPINGS, key=errors.__getitem__)
        after = whole.ridge(before, best) if errors[best] < whole.error(before) else before
    return after if last else whole.widened(after)
