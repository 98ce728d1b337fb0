"""Codes that make up for each other's rounding errors on the inputs that the layer has.

Rounding to nearest loses least of the weight. What counts is the layer's output: a row that changes by ``d`` loses
``dᵀ·C·d`` with the second moments ``C = E[x xᵀ]`` of its inputs, and errors of weights whose inputs go together can
cancel. From the row as it is rounded to nearest, by the same number of bits, three steps lead to less:

1. In order (GPTQ, arXiv 2210.17323; with pruned weights SparseGPT, arXiv 2301.00774): weights are rounded one after
   the other, those of the strongest inputs first, and those still open move to where they make up best for what was
   lost. A row for which this comes out worse stays as it was.
2. The scale of least loss for the codes, ``wᵀ·C·q / qᵀ·C·q``.
3. Each code to its best while all others stay, until none moves (QuantEase, arXiv 2309.01885).

Steps 2 and 3 alternate. None takes a byte. What always holds: a pruned weight stays pruned, and no row loses more than
rounded to nearest by the moments as they are taken here: of unit size, and drawn to the identity the more, the fewer
inputs they are of (`shrunk`), so that what is seen by chance is not fitted. In numba, because a weight depends on the
one before it.
"""

import numba
import numpy as np
import torch
from torch import Tensor

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
    rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    kept: Tensor,
    bits: int,
    curvature: Tensor,
    ordered: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Better codes and scales.

    Args:
        rows: ``(channels, n)`` float32 weights, the largest magnitude of every row about 1 (or 0).
        codes: ``(channels, n)`` float32 whole numbers, rounded to nearest.
        scales: ``(channels,)`` float32.
        kept: ``(channels, n)`` bool, False where pruned.
        bits: of a code.
        curvature: ``(n, n)`` float64, as `shrunk` gives it, positive definite.
        ordered: of that, as `in_order` gives it.

    Returns:
        Codes and scales.

    >>> rows, codes = torch.tensor([[0.4, 0.4]]), torch.tensor([[0.0, 0.0]])
    >>> curvature = shrunk(torch.ones(2, 2), float("inf"))  # both inputs are the same: only the weights' sum counts
    >>> compensated(rows, codes, torch.ones(1), codes == 0, 4, curvature, in_order(curvature))[0].sum()
    tensor(1.)
    """
    low, high = np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)
    metric = curvature.float()
    best = _in_order(rows, scales, kept, low, high, *ordered)
    better = _loss(rows - best * scales[:, None], metric) < _loss(rows - codes * scales[:, None], metric)
    codes = torch.where(better[:, None], best, codes)
    for _ in range(ROUNDS):
        scales = _refitted(rows, codes, scales, metric)
        gradient = (rows - codes * scales[:, None]) @ metric
        _descend(codes.numpy(), gradient.numpy(), scales.numpy(), kept.numpy(), metric.numpy(), low, high)
    return codes, _refitted(rows, codes, scales, metric)


def _loss(change: Tensor, metric: Tensor) -> Tensor:
    return ((change @ metric) * change).sum(1)


def _refitted(rows: Tensor, codes: Tensor, scales: Tensor, metric: Tensor) -> Tensor:
    through = codes @ metric
    square, product = (through * codes).sum(1), (through * rows).sum(1)
    return torch.where((square > 0) & (product != 0), product / square, scales)


def _in_order(
    rows: Tensor, scales: Tensor, kept: Tensor, low: np.float32, high: np.float32, order: Tensor, root: Tensor
) -> Tensor:
    open_rows, kept, codes = rows[:, order], kept[:, order], torch.zeros_like(rows)
    for start in range(0, rows.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        own = open_rows[:, block].contiguous().numpy()
        found, lost = _rounded(
            own, scales.numpy(), kept[:, block].contiguous().numpy(), root[block, block].contiguous().numpy(), low, high
        )
        codes[:, order[block]] = torch.from_numpy(found)
        open_rows[:, start + BLOCK :] -= torch.from_numpy(lost) @ root[block, start + BLOCK :]
    return codes


@numba.njit(cache=True, nogil=True)
def _rounded(rows, scales, kept, root, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Codes of a block of columns, and what each lost over its diagonal of the root; ``rows`` is overwritten."""
    codes, lost = np.zeros_like(rows), np.zeros_like(rows)
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            if kept[i, j] and scales[i] != 0:
                codes[i, j] = min(max(np.rint(rows[i, j] / scales[i]), low), high)
            lost[i, j] = (rows[i, j] - codes[i, j] * scales[i]) / root[j, j]
            for k in range(j + 1, rows.shape[1]):
                rows[i, k] -= lost[i, j] * root[j, k]
    return codes, lost


@numba.njit(cache=True, nogil=True)
def _descend(codes, gradient, scales, kept, metric, low, high):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Codes to their best, one at a time, in place; ``gradient`` is ``(rows - codes·scales)·C`` and follows."""
    for i in range(codes.shape[0]):
        if scales[i] == 0:
            continue
        for _ in range(SWEEPS):
            moved = False
            for j in range(codes.shape[1]):
                if not kept[i, j]:
                    continue
                best = min(max(np.rint(codes[i, j] + gradient[i, j] / metric[j, j] / scales[i]), low), high)
                if best != codes[i, j]:
                    step = (best - codes[i, j]) * scales[i]
                    codes[i, j] = best
                    moved = True
                    for k in range(codes.shape[1]):
                        gradient[i, k] -= step * metric[j, k]
            if not moved:
                break
