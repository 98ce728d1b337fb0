"""Tucker-2: fewer input and output channels around a kernel (Kim et al., arXiv 1511.06530)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.transforms.base import Target, Weight
from qcompress.transforms.low_rank.decomposition import damped, eigenvectors, roots
from qcompress.transforms.low_rank.forms import Factorisation, Factors, Ranks, kernel_of, moments_of, outputs_of


@dataclass(frozen=True, slots=True)
class Tucker(Factorisation):
    """Fewer input and output channels around the kernel; ranks ``(in, out)``.

    The bases are those of the higher-order SVD, whose squared error is at most twice the least one. They are nested, so
    one core serves all pairs of ranks. When whitened, the input basis uses the moments of the channels, averaged over
    the kernel's positions, and the last layer is fitted to all moments (`refitted`).
    """

    def label(self, ranks: Ranks) -> str:
        """Short name, such as ``"Tucker ranks 4, 8"``: ranks of inputs and outputs."""
        return f"Tucker ranks {ranks[0]}, {ranks[1]}"

    def why_not(self, target: Target) -> str:
        """The layer must have a kernel larger than 1×1."""
        if target.window is None:
            return "only a Conv2d has a kernel to put between"
        return "a kernel of 1×1 is a matrix" if target.window.kernel == (1, 1) else ""

    def largest(self, target: Target) -> Ranks:
        """The numbers of input and output channels."""
        height, width = kernel_of(target)
        return (target.per_channel // (height * width), target.channels)

    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """``(r_in, in)``, ``(r_out, r_in · kernel)``, ``(out, r_out)``."""
        (inputs, outputs), (height, width) = self.largest(target), kernel_of(target)
        return {
            "reduce": (ranks[0], inputs),
            "core": (ranks[1], ranks[0] * height * width),
            "expand": (outputs, ranks[1]),
        }

    def positions(self, target: Target) -> tuple[float, ...]:
        """The first layer is evaluated at every input position, the others at every output position."""
        assert target.window is not None  # noqa: S101
        return target.window.inputs, outputs_of(target), outputs_of(target)

    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """Return the first rows and columns of the bases, and the core between them."""
        down, core, up = self._bases(weight, whitened=whitened)
        narrow = core[: ranks[1], : ranks[0]].reshape(ranks[1], -1)
        return {"reduce": down[: ranks[0]], "core": narrow, "expand": up[:, : ranks[1]]}

    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Contract over both ranks."""
        reduce, core = factors["reduce"], factors["core"].reshape(len(factors["core"]), len(factors["reduce"]), -1)
        narrow = torch.einsum("ri,srk->sik", reduce, core).reshape(len(core), -1)
        return factors["expand"] @ narrow

    def within(self, weight: Weight, share: float, *, whitened: bool) -> Ranks | None:
        """Return the pair of ranks with the most energy among those that fit."""
        kept, size = self._grid(weight, whitened=whitened)
        fits = size <= share * weight.target.num_weights
        return _pair(torch.where(fits, kept, -1.0).argmax(), kept) if bool(fits.any()) else None

    def keeping(self, weight: Weight, share: float, *, whitened: bool) -> Ranks:
        """Return the pair of ranks with the fewest weights among those that keep the share."""
        kept, size = self._grid(weight, whitened=whitened)
        enough = kept >= share * kept[-1, -1] * (1 - 1e-12)
        return _pair(torch.where(enough, size, torch.inf).argmin(), kept)

    def _grid(self, weight: Weight, *, whitened: bool) -> tuple[Tensor, Tensor]:
        """Return the energy kept and number of weights for every pair of ranks (out, in), counted from 1."""
        _, core, _ = self._bases(weight, whitened=whitened)
        kept = core.square().sum((2, 3)).cumsum(0).cumsum(1)
        (inputs, outputs), (height, width) = self.largest(weight.target), kernel_of(weight.target)
        narrow = torch.arange(1, inputs + 1, dtype=torch.float64)
        wide = torch.arange(1, outputs + 1, dtype=torch.float64)[:, None]
        return kept, narrow * inputs + wide * narrow * height * width + wide * outputs

    def _bases(self, weight: Weight, *, whitened: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``(in, in)`` into the input basis, the full core ``(out, in, height, width)``, and ``(out, out)`` back."""
        return weight.once((self, whitened), lambda: self._decomposed(weight, whitened=whitened))

    def _decomposed(self, weight: Weight, *, whitened: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, (height, width) = weight.exact(), kernel_of(weight.target)
        grid = rows.reshape(len(rows), -1, height, width)
        unfolded, seen = grid.transpose(0, 1).reshape(grid.shape[1], -1), rows
        root = inverse = torch.eye(len(unfolded), dtype=torch.float64)
        if whitened:
            moments = moments_of(weight)
            seen = rows @ damped(moments)
            shape = (grid.shape[1], height * width) * 2
            root, inverse = roots(damped(torch.einsum("ikjk->ij", moments.reshape(shape))))
        turned = root.T @ unfolded
        _, inputs = eigenvectors(turned @ turned.T)
        _, outputs = eigenvectors(seen @ rows.T)
        core = torch.einsum("oihw,os,ir->srhw", grid, outputs, root @ inputs)
        return inputs.T @ inverse, core, outputs


def _pair(place: Tensor, grid: Tensor) -> Ranks:
    outputs, inputs = divmod(int(place), grid.shape[1])
    return inputs + 1, outputs + 1
