"""Codes that make up for each other's rounding errors on the inputs that the layer has.

Rounding to nearest loses least of the weight. What counts is the layer's output: a row that changes by ``d`` loses
``dᵀ·C·d`` with the second moments ``C = E[x xᵀ]`` of its inputs, and errors of weights whose inputs go together can
cancel. From the row as it is rounded to nearest, by the same number of bits, three steps lead to less:

1. In order (GPTQ, arXiv 2210.17323; with pruned weights SparseGPT, arXiv 2301.00774): weights are rounded one after
   the other, those of the strongest inputs first, and those still open move to where they make up best for what was
   lost. A row for which this comes out worse stays as it was.
2. The scales of least loss for the codes, one after the other: of a whole row ``wᵀ·C·q / qᵀ·C·q``.
3. Each code to its best while all others stay, until none moves (QuantEase, arXiv 2309.01885).

Steps 2 and 3 alternate. None takes a byte. A row has one scale, or one for each group of its weights (`Grid`). What
always holds: a pruned weight stays pruned, and no row loses more than rounded to nearest by the moments as they are
taken here: of unit size, and drawn to the identity the more, the fewer inputs they are of (`shrunk`), so that what is
seen by chance is not fitted. In numba, because a weight depends on the one before it.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qcompress.transforms.quantize.grid import Grid
from solvers.kernels.compiled import compiled

SHRINKAGE = 0.01  # at least: GPTQ's damping
BLOCK = 128  # columns rounded before the others hear of it: the rest is one matrix product
ROUNDS, SWEEPS = 2, 10


def shrunk(moments: Tensor, num_inputs: float) -> Tensor:
    """``C`` in float64, of mean diagonal 1 and drawn to the identity; zeros for a layer that never sees anything.

    By how much is the oracle approximating shrinkage (Chen et al., arXiv 0907.4698) for so many independent inputs.

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


def in_order(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """An order of the columns ``(n,)`` and float32 ``U`` ``(n, n)``, upper: ``Uᵀ·U`` is the inverse in that order."""
    order = torch.argsort(curvature.diagonal(), descending=True, stable=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature[order][:, order]))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def compensated(
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, curvature: Tensor, ordered: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Better codes and scales.

    Args:
        rows: ``(channels, n)`` float32 weights, the largest magnitude of every row about 1 (or 0).
        codes: ``(channels, n)`` float32 whole numbers, rounded to nearest.
        grid: what they are codes of.
        kept: ``(channels, n)`` bool, False where pruned.
        curvature: ``(n, n)`` float64, as `shrunk` gives it, positive definite.
        ordered: of that, as `in_order` gives it.

    Returns:
        Codes ``(channels, n)`` and scales ``(channels, groups)``.

    >>> rows, codes = torch.tensor([[0.4, 0.4]]), torch.tensor([[0.0, 0.0]])
    >>> grid = Grid(scales=torch.ones(1, 1), low=torch.tensor([[-8.0]]), high=torch.tensor([[7.0]]), group_size=2)
    >>> curvature = shrunk(torch.ones(2, 2), float("inf"))  # both inputs are the same: only the weights' sum counts
    >>> compensated(rows, codes, grid, codes == 0, curvature, in_order(curvature))[0].sum()
    tensor(1.)
    """
    metric, grid = curvature.float(), replace(grid, scales=grid.scales.contiguous().clone())
    best = _in_order(rows, grid, kept, *ordered)
    apart, nearest = (_residual(rows, tried, grid) for tried in (best, codes))
    codes = torch.where((_loss(apart, metric) < _loss(nearest, metric))[:, None], best, codes)
    for _ in range(ROUNDS):
        gradient = _residual(rows, codes, grid) @ metric
        _refit(codes, grid, gradient, metric)
        _descend(
            codes.numpy(), gradient.numpy(), grid.scales.numpy(), kept.numpy(), metric.numpy(), grid.low.numpy(),
            grid.high.numpy(), grid.group_size,
        )  # fmt: skip
    _refit(codes, grid, _residual(rows, codes, grid) @ metric, metric)
    return codes, grid.scales


def _residual(rows: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    return rows - codes * grid.spread(rows.shape[1])


def _loss(change: Tensor, metric: Tensor) -> Tensor:
    return ((change @ metric) * change).sum(1)


def _refit(codes: Tensor, grid: Grid, gradient: Tensor, metric: Tensor) -> None:
    """Scales to their best, a group at a time, in place; ``gradient`` is ``(rows - codes·scales)·C`` and follows."""
    for group, start in enumerate(range(0, codes.shape[1], grid.group_size)):
        here = slice(start, start + grid.group_size)
        own, scales = codes[:, here], grid.scales[:, group]
        square, product = ((own @ metric[here, here]) * own).sum(1), (own * gradient[:, here]).sum(1)
        wanted = grid.storable(torch.where(square > 0, scales + product / square, scales))
        step = wanted - scales
        step = torch.where((wanted != 0) & (step * (2 * product - step * square) > 0), step, 0.0)
        scales += step
        gradient -= (own * step[:, None]) @ metric[here]


def _in_order(rows: Tensor, grid: Grid, kept: Tensor, order: Tensor, root: Tensor) -> Tensor:
    open_rows, kept, codes = rows[:, order], kept[:, order], torch.zeros_like(rows)
    of_group = (order // grid.group_size).numpy()
    for start in range(0, rows.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        own = open_rows[:, block].contiguous().numpy()
        found, lost = _rounded(
            own, grid.scales.numpy(), kept[:, block].contiguous().numpy(), root[block, block].contiguous().numpy(),
            grid.low.numpy(), grid.high.numpy(), of_group[block],
        )  # fmt: skip
        codes[:, order[block]] = torch.from_numpy(found)
        open_rows[:, start + BLOCK :] -= torch.from_numpy(lost) @ root[block, start + BLOCK :]
    return codes


@compiled
def _rounded(rows, scales, kept, root, low, high, of_group):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Codes of a block of columns, and what each lost over its diagonal of the root; ``rows`` is overwritten."""
    codes, lost = np.zeros_like(rows), np.zeros_like(rows)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            group = of_group[j]
            scale = scales[i, group]
            if kept[i, j] and scale != 0:
                codes[i, j] = min(max(np.rint(rows[i, j] / scale), low[i, group]), high[i, group])
            lost[i, j] = (rows[i, j] - codes[i, j] * scale) / root[j, j]
            for k in range(j + 1, rows.shape[1]):
                rows[i, k] -= lost[i, j] * root[j, k]
    return codes, lost


@compiled
def _descend(codes, gradient, scales, kept, metric, low, high, size):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Codes to their best, one at a time, in place; ``gradient`` is ``(rows - codes·scales)·C`` and follows."""
    for i in range(codes.shape[0]):
        for _ in range(SWEEPS):
            moved = False
            for j in range(codes.shape[1]):
                group = j // size
                scale = scales[i, group]
                if scale == 0 or not kept[i, j]:
                    continue
                wanted = codes[i, j] + gradient[i, j] / metric[j, j] / scale
                best = min(max(np.rint(wanted), low[i, group]), high[i, group])
                if best != codes[i, j]:
                    step = (best - codes[i, j]) * scale
                    codes[i, j] = best
                    moved = True
                    for k in range(codes.shape[1]):
                        gradient[i, k] -= step * metric[j, k]
            if not moved:
                break
