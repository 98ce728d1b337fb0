"""The forms of a low-rank layer: which smaller layers replace it, and which factors they hold.

| form | layers that replace the layer |
|---|---|
| `Channels` | the kernel to as many channels as the rank, then 1×1 to all; for a Linear layer two Linear layers |
| `Channels` with slices | the same for each slice of the input channels (ALDS, arXiv 2107.11442), grouped |
| `Spatial` | a vertical kernel to as many channels as the rank, then a horizontal one (Jaderberg, arXiv 1405.3866) |
| `Tucker` | 1×1 to fewer input channels, the kernel, 1×1 to all outputs (Tucker-2, Kim et al., arXiv 1511.06530) |

A factor is seen as rows, as every weight is. Invariants: the factors have the `shapes` of the form, and `product` gives
the rows of the dense weight. Each form needs one decomposition for all its ranks. `Tucker` has its own module.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qcompress.transforms.base import Target, Weight
from qcompress.transforms.column_blocks import times
from qcompress.transforms.low_rank.decomposition import Decomposition, columns_for, damped, split

Ranks = tuple[int, ...]
Factors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Factorisation(ABC):
    """One way to replace a layer by smaller ones."""

    @abstractmethod
    def label(self, ranks: Ranks) -> str:
        """Short name, such as ``"rank 8"``."""

    @abstractmethod
    def why_not(self, target: Target) -> str:
        """Why the form does not fit a layer, or an empty string."""

    @abstractmethod
    def largest(self, target: Target) -> Ranks:
        """The ranks that reproduce the weight exactly."""

    @abstractmethod
    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """The shapes of the factors as rows, in the order of the layers."""

    @abstractmethod
    def positions(self, target: Target) -> tuple[float, ...]:
        """For each factor, how often it is multiplied per sample."""

    @abstractmethod
    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """Return the float64 factors of the given ranks."""

    @abstractmethod
    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:
        """Return the rows of the dense weight with the given kernel."""

    def first_moments(self, weight: Weight) -> Tensor | None:  # noqa: ARG002
        """Return the second moments of the first factor's input if its rows have a common input, else None."""
        return None

    @abstractmethod
    def within(self, weight: Weight, share: float, *, whitened: bool) -> Ranks | None:
        """Return the best ranks whose factors have at most the given share of the weights, or None."""

    @abstractmethod
    def keeping(self, weight: Weight, share: float, *, whitened: bool) -> Ranks:
        """Return the smallest ranks (at least 1) that keep the given share of the energy."""


@dataclass(frozen=True, slots=True)
class MatrixFactorisation(Factorisation):
    """A form in which each slice of the weight is a product of two matrices."""

    @abstractmethod
    def matrices(self, weight: Weight, *, whitened: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Return the matrices to split, and the second moments of their inputs."""

    def splits(self, weight: Weight, rank: int | None, *, whitened: bool) -> list[Decomposition]:
        """Return the split of each matrix, good for ``rank`` (None: for all ranks); computed once per weight."""
        columns = None if rank is None else columns_for(rank, *self.largest(weight.target))
        matrices = functools.partial(self.matrices, weight, whitened=whitened)
        return weight.once((self, whitened, columns), lambda: [split(*matrix, columns) for matrix in matrices()])

    def within(self, weight: Weight, share: float, *, whitened: bool) -> Ranks | None:  # noqa: ARG002
        """Return the largest rank that fits; needs no decomposition."""
        weights_per_rank = sum(rows * columns for rows, columns in self.shapes(weight.target, (1,)).values())
        rank = min(int(share * weight.target.num_weights / weights_per_rank), self.largest(weight.target)[0])
        return (rank,) if rank else None

    def keeping(self, weight: Weight, share: float, *, whitened: bool) -> Ranks:
        """Return the smallest rank by the energies of all slices together."""
        (largest,) = self.largest(weight.target)
        trial = 32
        while columns_for(trial, largest) is not None:
            rank = _first_keeping(self.splits(weight, trial, whitened=whitened), share)
            if rank <= trial:
                return (rank,)
            trial *= 2
        return (min(_first_keeping(self.splits(weight, None, whitened=whitened), share), largest),)


@dataclass(frozen=True, slots=True)
class Channels(MatrixFactorisation):
    """A bottleneck of channels; with ``slices``, one for each slice of the input channels.

    When whitened, a slice uses its own block of the moments; only the last layer is fitted to all of them (`refitted`).
    """

    slices: int = 1

    def label(self, ranks: Ranks) -> str:
        """Short name, such as ``"rank 8"`` or ``"2 slices of rank 8"``."""
        return f"rank {ranks[0]}" if self.slices == 1 else f"{self.slices} slices of rank {ranks[0]}"

    def why_not(self, target: Target) -> str:
        """The number of slices must divide the number of input channels."""
        height, width = kernel_of(target)
        inputs = target.per_channel // (height * width)
        return f"{inputs} input channels are not divided by {self.slices} slices" if inputs % self.slices else ""

    def largest(self, target: Target) -> Ranks:
        """The largest rank of the slices' matrices."""
        return (min(target.channels, target.per_channel // self.slices),)

    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """The slices are stacked vertically in ``reduce`` and side by side in ``expand``."""
        narrow = self.slices * ranks[0]
        return {"reduce": (narrow, target.per_channel // self.slices), "expand": (target.channels, narrow)}

    def positions(self, target: Target) -> tuple[float, ...]:
        """Each layer is evaluated once per output position."""
        return (outputs_of(target),) * 2

    def first_moments(self, weight: Weight) -> Tensor | None:
        """Return the moments of the layer's inputs; None with several slices, which have different inputs."""
        return moments_of(weight) if self.slices == 1 else None

    def matrices(self, weight: Weight, *, whitened: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Return the slices, each with its own block of the moments."""
        parts = weight.exact().chunk(self.slices, dim=1)
        if not whitened:
            return [(part, None) for part in parts]
        if self.slices == 1:
            return [(parts[0], moments_of(weight))]
        width = parts[0].shape[1]
        moments = [moments_of(weight)[i : i + width, i : i + width] for i in range(0, self.slices * width, width)]
        return list(zip(parts, moments, strict=True))

    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """Return the first columns and rows of every slice's split."""
        splits, rank = self.splits(weight, ranks[0], whitened=whitened), ranks[0]
        return {
            "reduce": torch.cat([piece.right[:rank] for piece in splits]),
            "expand": torch.cat([piece.left[:, :rank] for piece in splits], dim=1),
        }

    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Multiply slice by slice."""
        reduce, expand = factors["reduce"].chunk(self.slices), factors["expand"].chunk(self.slices, dim=1)
        return torch.cat([after @ before for before, after in zip(reduce, expand, strict=True)], dim=1)


@dataclass(frozen=True, slots=True)
class Spatial(MatrixFactorisation):
    """A vertical convolution, then a horizontal one.

    When whitened, the first layer uses the moments of a column, averaged over the kernel's columns. Correlations
    between columns enter only when the second layer is fitted (`refitted`).
    """

    def label(self, ranks: Ranks) -> str:
        """Short name, such as ``"spatial rank 8"``."""
        return f"spatial rank {ranks[0]}"

    def why_not(self, target: Target) -> str:
        """The kernel must be wider than 1."""
        if target.window is None:
            return "only a Conv2d has a kernel to split"
        return "a kernel one wide has no rows to split off" if target.window.kernel[1] == 1 else ""

    def largest(self, target: Target) -> Ranks:
        """The largest rank of the matrix ``(out · width, in · height)``."""
        width = kernel_of(target)[1]
        return (min(target.channels * width, target.per_channel // width),)

    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """``(rank, in · height)`` and ``(out, rank · width)``."""
        width = kernel_of(target)[1]
        return {
            "vertical": (ranks[0], target.per_channel // width),
            "horizontal": (target.channels, ranks[0] * width),
        }

    def positions(self, target: Target) -> tuple[float, ...]:
        """The output of the first layer already has the output's height, but still the input's width."""
        assert target.window is not None  # noqa: S101
        return target.window.halfway, outputs_of(target)

    def matrices(self, weight: Weight, *, whitened: bool) -> list[tuple[Tensor, Tensor | None]]:
        """One matrix: outputs and kernel columns against inputs and kernel rows."""
        height, width = kernel_of(weight.target)
        grid = weight.exact().reshape(weight.target.channels, -1, height, width)
        matrix = grid.permute(0, 3, 1, 2).reshape(weight.target.channels * width, -1)
        return [(matrix, self.first_moments(weight) if whitened else None)]

    def first_moments(self, weight: Weight) -> Tensor | None:
        """Return the moments of a column, averaged over the kernel's columns."""
        height, width = kernel_of(weight.target)
        inputs = weight.target.per_channel // (height * width)
        moments = moments_of(weight).reshape(inputs, height, width, inputs, height, width)
        return torch.einsum("ihwjkw->ihjk", moments).reshape(inputs * height, -1) / width

    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """Return the first rows and columns of the split."""
        (piece,) = self.splits(weight, ranks[0], whitened=whitened)
        left = piece.left[:, : ranks[0]].reshape(weight.target.channels, -1, ranks[0])
        return {"vertical": piece.right[: ranks[0]], "horizontal": left.transpose(1, 2).reshape(len(left), -1)}

    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:
        """Contract over the rank."""
        vertical, horizontal = factors["vertical"], factors["horizontal"]
        rank, outputs, (height, width) = len(vertical), len(horizontal), kernel
        left = horizontal.reshape(outputs, rank, width).transpose(1, 2).reshape(-1, rank)
        grid = (left @ vertical).reshape(outputs, width, -1, height)
        return grid.permute(0, 2, 3, 1).reshape(outputs, -1)


def kernel_of(target: Target) -> tuple[int, int]:
    """Return the height and width of the kernel; 1×1 for a Linear layer."""
    return target.window.kernel if target.window else (1, 1)


def refitted(factors: Factors, form: Factorisation, weight: Weight, *, whitened: bool) -> Factors:
    """Refit the last factor by least squares, given the others.

    This compensates for moments that a form neglected, for bases that are not optimal together, and for the rounding of
    the other factors. With ``B`` the map from the layer's input to the last factor's input, the result is
    ``W·C·Bᵀ·(B·C·Bᵀ)⁻¹``.
    """
    *_, last = factors
    seen = seen_by_last(factors, form, weight)
    moments = weight.once_of_inputs("damped", lambda: damped(moments_of(weight))) if whitened else None
    through = seen.T if moments is None else times(seen, moments).T
    inverse = torch.linalg.pinv(seen @ through, hermitian=True)
    return factors | {last: weight.exact() @ through @ inverse}


def seen_by_last(factors: Factors, form: Factorisation, weight: Weight) -> Tensor:
    """Return ``B``, the map from the layer's (unfolded) input to the input of the last factor."""
    *_, last = factors
    unit = torch.eye(factors[last].shape[1], dtype=torch.float64)
    return form.product(factors | {last: unit}, kernel_of(weight.target))


def leveled(factors: Factors) -> Factors:
    """Balance the factors: share the scale of each rank component evenly between neighbours, at the same product.

    Both factors then keep their digits in half precision, and lose least when they are pruned and quantized.

    Args:
        factors: the factors in the order of the layers; a factor's rows match the next one's blocks of columns.
    """
    levels = dict(factors)
    for after, before in pairwise(reversed(factors)):
        later, earlier = levels[after], levels[before]
        blocks = later.reshape(len(later), len(earlier), -1)
        sizes = _nonzero((blocks.norm(dim=(0, 2)) / _nonzero(earlier.norm(dim=1))).sqrt())
        levels[after] = (blocks / sizes[:, None]).reshape(later.shape)
        levels[before] = earlier * sizes[:, None]
    return levels


def outputs_of(target: Target) -> float:
    """Return how often the layer's own weights are multiplied per sample."""
    return target.macs / target.num_weights


def moments_of(weight: Weight) -> Tensor:
    """Return the moments in float64; they must be present."""
    assert weight.moments is not None  # noqa: S101
    return weight.moments.double()


def _first_keeping(splits: list[Decomposition], share: float) -> int:
    """Return the smallest rank whose energy reaches the share of the total; the number of ranks + 1 if none does."""
    kept = torch.stack([piece.energy for piece in splits]).sum(0).cumsum(0)
    enough = kept >= share * sum(piece.total for piece in splits) * (1 - 1e-12)
    return int((~enough).sum()) + 1


def _nonzero(divisors: Tensor) -> Tensor:
    return torch.where(divisors > 0, divisors, torch.ones(()).to(divisors))
