"""The best approximations of every rank at once, plain and weighted by the inputs.

A `Decomposition` of a matrix ``A`` (a, b) is nested: ``left[:, :r] @ right[:r]`` is the best approximation of rank r
for every r it holds, so that one serves all ranks. Best means the least ``‖A - A'‖²`` (Eckart-Young) or, with the
second moments ``C = E[x xᵀ]`` of A's inputs, the least ``E‖(A - A')x‖² = tr((A - A')·C·(A - A')ᵀ)``: the projection
``U_r U_rᵀ A`` onto the first eigenvectors of ``A·C·Aᵀ``, which needs no inverse of C. (SVD-LLM, arXiv 2403.07378,
obtains the same product from the Cholesky factor of C.)

All work is done in float64 from the eigenvectors of a Gram matrix of the shorter side, which is much faster than a full
decomposition. Squaring costs half the digits of the small singular values, but the remaining digits still exceed those
of a float32 weight. From `LARGE` rows and columns on, ranks of up to an eighth are found by randomised subspace
iteration (Halko et al., arXiv 0909.4061), whose squared error is within 1 % of the least if the spectrum decays at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.transforms.column_blocks import times

LARGE = 1536  # an exact decomposition takes a few seconds at this size, and eight times as long at twice the size
PASSES = 4  # passes of subspace iteration
DAMPING = 1e-6  # relative to the mean of C's diagonal: orders directions that never occur by their plain energy


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """Nested factors of a matrix.

    Attributes:
        left: ``(a, R)``.
        right: ``(R, b)``.
        energy: ``(R,)`` energy that each rank adds, descending.
        total: energy of the whole matrix.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    total: float


def split(matrix: Tensor, moments: Tensor | None = None, columns: int | None = None) -> Decomposition:
    """Return the nested factors of a float64 matrix.

    Args:
        matrix: ``(a, b)``.
        moments: ``(b, b)`` second moments, possibly singular, or blocks of columns of them; None for the identity.
        columns: number of columns for randomised subspace iteration, whose result is good for ranks somewhat below it;
            None for an exact decomposition.

    >>> exact = split(torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)))
    >>> exact.energy.round().tolist()
    [9.0, 4.0, 1.0]
    >>> (exact.left[:, :2] @ exact.right[:2]).round().abs().diag().tolist()
    [3.0, 0.0, 2.0]
    """
    seen_by = None if moments is None else damped(moments)
    seen = matrix if seen_by is None else times(matrix, seen_by)
    total = float((seen * matrix).sum())
    if columns is not None:
        left, energy = _leading(matrix, seen_by, columns)
    elif len(matrix) <= matrix.shape[1]:
        energy, left = eigenvectors(seen @ matrix.T)
    else:
        root, inverse = (None, None) if seen_by is None else roots(seen_by)
        core = matrix if root is None else times(matrix, root)
        energy, right = eigenvectors(core.T @ core)
        return Decomposition(core @ right, right.T if inverse is None else times(right.T, inverse), energy, total)
    return Decomposition(left, left.T @ matrix, energy, total)


def eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return a positive semidefinite matrix's eigenvalues, descending and clipped at 0, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``L`` with ``L Lᵀ = C`` for damped moments, and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    least = DAMPING * float(moments.diagonal(dim1=-2, dim2=-1).mean())
    stretch = values.clamp(min=least).sqrt()[..., None, :]  # rounding may undercut the damping
    return vectors * stretch, (vectors / stretch).mT


def damped(moments: Tensor) -> Tensor:
    """Add a small multiple of the identity to C; returns the identity itself if all inputs are zero."""
    mean, unit = float(moments.diagonal(dim1=-2, dim2=-1).mean()), torch.eye(moments.shape[-1], dtype=torch.float64)
    return moments.double() + DAMPING * mean * unit if mean > 0 else unit.expand(moments.shape)


def _leading(matrix: Tensor, moments: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """Return the first eigenvectors of ``A·C·Aᵀ``, by subspace iteration from a fixed random start."""

    def seen(basis: Tensor) -> Tensor:
        turned = matrix.T @ basis
        return turned if moments is None else times(turned.T, moments).T

    start = torch.randn(len(matrix), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start).Q
    for _ in range(PASSES):
        basis = torch.linalg.qr(matrix @ seen(basis)).Q
    energy, turn = eigenvectors((matrix.T @ basis).T @ seen(basis))
    return basis @ turn, energy


def columns_for(rank: int, shorter: int) -> int | None:
    """Return the columns to iterate on for a rank, rounded up so that many ranks share them; None for exact factors.

    >>> columns_for(20, shorter=4096), columns_for(20, shorter=64)
    (64, None)
    """
    wanted = rank + max(rank // 4, 8)
    columns = max(64, 1 << (wanted - 1).bit_length())
    return columns if shorter >= LARGE and columns <= shorter // 4 and rank <= shorter // 8 else None
