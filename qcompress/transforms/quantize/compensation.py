"""Codes whose rounding errors compensate for each other on the layer's inputs.

Rounding to nearest minimises the error of the weights. What matters is the layer's output: changing a row by ``d``
costs ``dᵀ·C·d`` with the second moments ``C = E[x xᵀ]`` of its inputs, and errors of weights with correlated inputs can
cancel. Starting from the row rounded to nearest, three steps reduce this cost at the same number of bits:

1. In-order rounding (GPTQ, arXiv 2210.17323; with pruned weights SparseGPT, arXiv 2301.00774): weights are rounded one
   after the other, strongest inputs first, and the weights not yet rounded are moved to compensate for the error so
   far. A row for which the result is worse keeps its codes.
2. Refitting the scales to the codes, one after the other: for a whole row ``wᵀ·C·q / qᵀ·C·q``.
3. Coordinate descent: set each code to its best value while all others stay, until none changes (QuantEase,
   arXiv 2309.01885).

Steps 2 and 3 alternate. None of the steps needs extra bytes. A row has one scale, or one for each group of its weights
(`Grid`). Invariants: a pruned weight stays pruned, and no row loses more than it does rounded to nearest, measured with
the moments used here. These are scaled to mean diagonal 1 and shrunk towards the identity, more strongly the fewer
inputs they are averaged over (`shrunk`), so that sampling noise is not fitted. The inner loops use numba, because each
weight depends on the one before it.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.transforms.quantize.grid import Grid
from qcompress.transforms.threads import over_rows
from solvers.kernels.compiled import compiled

SHRINKAGE = 0.01  # the minimum: GPTQ's damping
BLOCK = 128  # columns rounded before the others are updated: the update of the rest is one matrix product
ROUNDS, SWEEPS = 2, 10


def shrunk(moments: Tensor, num_inputs: float) -> Tensor:
    """Return ``C`` in float64, scaled to mean diagonal 1 and shrunk towards the identity; zeros if all inputs are zero.

    The shrinkage is the oracle approximating shrinkage (Chen et al., arXiv 0907.4698) for ``num_inputs`` independent
    inputs.

    >>> shrunk(torch.diag(torch.tensor([3.0, 1.0])), num_inputs=float("inf"))
    tensor([[1.4950, 0.0000],
            [0.0000, 0.5050]], dtype=torch.float64)
    >>> shrunk(torch.diag(torch.tensor([3.0, 1.0])), num_inputs=4).diagonal()
    tensor([1., 1.], dtype=torch.float64)
    """
    exact, size = moments.double(), len(moments)
    mean = exact.diagonal().mean()
    if not mean > 0:
        return torch.zeros_like(exact)
    exact = exact / mean
    squares = float(exact.square().sum())
    spread = (num_inputs + 1 - 2 / size) * (squares - size)
    wanted = ((1 - 2 / size) * squares + size**2) / spread if spread > 0 else 1.0
    share = min(1.0, max(SHRINKAGE, wanted))
    return (1 - share) * exact + share * torch.eye(size, dtype=torch.float64)


def inverse_factor(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of columns ``(n,)`` and the float32 upper factor ``U`` ``(n, n)`` of their inverse, ``Uᵀ·U``."""
    order = torch.argsort(curvature.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def compensated(
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, curvature: Tensor, ordered: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Improve codes and scales.

    Args:
        rows: ``(channels, n)`` float32 weights, the largest magnitude of every row about 1 (or 0).
        codes: ``(channels, n)`` float32 whole numbers, rounded to nearest.
        grid: the grid that the codes refer to.
        kept: ``(channels, n)`` bool, False where pruned.
        curvature: ``(n, n)`` float64, positive definite, from `shrunk`.
        ordered: the result of `inverse_factor` for ``curvature``.

    Returns:
        Codes ``(channels, n)`` and scales ``(channels, groups)``.

    >>> rows, codes = torch.tensor([[0.4, 0.4]]), torch.tensor([[0.0, 0.0]])
    >>> grid = Grid(scales=torch.ones(1, 1), low=torch.tensor([[-8.0]]), high=torch.tensor([[7.0]]), group_size=2)
    >>> curvature = shrunk(torch.ones(2, 2), float("inf"))  # both inputs are the same: only the weights' sum counts
    >>> compensated(rows, codes, grid, codes == 0, curvature, inverse_factor(curvature))[0].sum()
    tensor(1.)
    """
    metric, grid = curvature.float(), replace(grid, scales=grid.scales.contiguous().clone())
    codes = best_of(rows, codes, round_in_order(rows, grid, kept, ordered), grid, metric)
    for _ in range(ROUNDS):
        gradient = residual(rows, codes, grid) @ metric
        refit(grid.scales, codes, grid.group_size, grid.storable, gradient, metric)
        descend(codes, grid, kept, gradient, metric)
    gradient = residual(rows, codes, grid) @ metric
    refit(grid.scales, codes, grid.group_size, grid.storable, gradient, metric)
    return codes, grid.scales


def best_of(rows: Tensor, codes: Tensor, others: Tensor, grid: Grid, metric: Tensor) -> Tensor:
    """For every row choose the one of two code vectors that loses less; ties go to the first."""
    losses = [
        ((change @ metric) * change).sum(1)
        for change in (residual(rows, candidates, grid) for candidates in (codes, others))
    ]
    return torch.where((losses[1] < losses[0])[:, None], others, codes)


def residual(rows: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Return the rows minus what the codes stand for, ``(channels, n)``."""
    return rows - codes * grid.spread(rows.shape[1])


def refit(
    factors: Tensor,
    along: Tensor,
    size: int,
    storable: Callable[[Tensor], Tensor],
    gradient: Tensor,
    metric: Tensor,
    *,
    zero: bool = False,
) -> None:
    """Refit the factor of every stretch of each row to its best storable value, one after the other; in place.

    Args:
        factors: ``(channels, stretches)``.
        along: ``(channels, n)`` the values that the factors multiply.
        size: columns of a stretch; the last may be shorter.
        storable: function that rounds factors ``(channels,)`` to the nearest ones that can be written.
        gradient: ``(channels, n)`` ``(rows - approximation)·C``; updated in place.
        metric: ``C``.
        zero: whether a factor may be 0.
    """
    span = size * max(1, BLOCK // size)
    for start in range(0, along.shape[1], span):  # a block is updated after each step, the rest once per block
        block = slice(start, start + span)
        change, near, inner = torch.zeros_like(along[:, block]), gradient[:, block].clone(), metric[block, block]
        for place in range(0, change.shape[1], size):
            cell = slice(place, place + size)
            direction, factor = along[:, block][:, cell], factors[:, (start + place) // size]
            square, product = ((direction @ inner[cell, cell]) * direction).sum(1), (direction * near[:, cell]).sum(1)
            wanted = storable(torch.where(square > 0, factor + product / square, factor))
            step = wanted - factor
            step = torch.where((step * (2 * product - step * square) > 0) & (zero | (wanted != 0)), step, 0.0)
            factor += step
            change[:, cell] = direction * step[:, None]
            near -= change[:, cell] @ inner[cell]
        gradient -= change @ metric[block]


def descend(codes: Tensor, grid: Grid, kept: Tensor, gradient: Tensor, metric: Tensor) -> None:
    """Set each code to its best value in turn, in place; also updates ``gradient``, ``(rows - codes·scales)·C``."""
    by_row = [values.numpy() for values in (codes, gradient, grid.scales, kept)]
    ends, columns = [values.numpy() for values in (grid.low, grid.high)], metric.numpy()

    def work(start: int, stop: int) -> None:
        rows, limits = ([values[start:stop] for values in each] for each in (by_row, ends))
        _descend(*rows, columns, *limits, grid.group_size, grid.numbers)

    over_rows(work, *codes.shape)


def round_in_order(rows: Tensor, grid: Grid, kept: Tensor, ordered: tuple[Tensor, Tensor]) -> Tensor:
    """Return codes ``(channels, n)``, rounded one column at a time; the remaining columns compensate for each error."""
    order, root = ordered
    open_rows, kept, codes = rows[:, order], kept[:, order], torch.zeros_like(rows)
    of_group = (order // grid.group_size).numpy()
    for start in range(0, rows.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        block_codes, lost = _rounded_rows(
            open_rows[:, block].contiguous(), kept[:, block].contiguous(), grid, of_group[block],
            root[block, block].contiguous().numpy(),
        )  # fmt: skip
        codes[:, order[block]] = block_codes
        open_rows[:, start + BLOCK :] -= lost @ root[block, start + BLOCK :]
    return codes


def _rounded_rows(
    rows: Tensor, kept: Tensor, grid: Grid, of_group: NDArray[np.int64], root: NDArray[np.float32]
) -> tuple[Tensor, Tensor]:
    """Return `_rounded` of all rows; ``rows`` is overwritten."""
    codes, lost = torch.empty_like(rows), torch.empty_like(rows)
    arrays = [values.numpy() for values in (codes, lost, rows, grid.scales, kept, grid.low, grid.high)]

    def work(start: int, stop: int) -> None:
        own_codes, own_lost, own_rows, scales, own_kept, low, high = (values[start:stop] for values in arrays)
        own_codes[:], own_lost[:] = _rounded(own_rows, scales, own_kept, root, low, high, of_group, grid.numbers)

    over_rows(work, *rows.shape)
    return codes, lost


@compiled
def _nearest(wanted, low, high, numbers):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The nearest whole number from low to high or, if ``numbers`` (ascending) is not empty, the nearest of them."""
    if not len(numbers):
        return min(max(np.rint(wanted), low), high)
    above = len(numbers) - 1
    below = 0
    while above - below > 1:
        middle = (above + below) // 2
        if numbers[middle] <= wanted:
            below = middle
        else:
            above = middle
    return numbers[below] if wanted - numbers[below] <= numbers[above] - wanted else numbers[above]


@compiled
def _rounded(rows, scales, kept, root, low, high, of_group, numbers):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Codes of a block of columns, and each one's error divided by the root's diagonal; ``rows`` is overwritten."""
    codes, lost = np.zeros_like(rows), np.zeros_like(rows)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            group = of_group[j]
            scale = scales[i, group]
            if kept[i, j] and scale != 0:
                codes[i, j] = _nearest(rows[i, j] / scale, low[i, group], high[i, group], numbers)
            lost[i, j] = (rows[i, j] - codes[i, j] * scale) / root[j, j]
            for k in range(j + 1, rows.shape[1]):
                rows[i, k] -= lost[i, j] * root[j, k]
    return codes, lost


@compiled
def _descend(codes, gradient, scales, kept, metric, low, high, size, numbers):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Set each code to its best value in turn, in place; also updates ``gradient``, ``(rows - codes·scales)·C``."""
    for i in range(codes.shape[0]):
        for _ in range(SWEEPS):
            moved = False
            for j in range(codes.shape[1]):
                group = j // size
                scale = scales[i, group]
                if scale == 0 or not kept[i, j]:
                    continue
                wanted = codes[i, j] + gradient[i, j] / metric[j, j] / scale
                best = _nearest(wanted, low[i, group], high[i, group], numbers)
                if best != codes[i, j]:
                    step = (best - codes[i, j]) * scale
                    codes[i, j] = best
                    moved = True
                    for k in range(codes.shape[1]):
                        gradient[i, k] -= step * metric[j, k]
            if not moved:
                break
