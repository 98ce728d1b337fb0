"""The closest matrices of every rank at once, plain and as seen by the inputs.

A `Split` of a matrix ``A`` (a, b) is nested: ``left[:, :r] @ right[:r]`` is the closest of rank r for every r it
holds, so that one decomposition serves all ranks. Closest means the least ``‖A - A'‖²`` (Eckart-Young) or, with the
second moments ``C = E[x xᵀ]`` of what A is multiplied with, the least ``E‖(A - A')x‖² = tr((A - A')·C·(A - A')ᵀ)``:
the projection ``U_r U_rᵀ A`` onto the first eigenvectors of ``A·C·Aᵀ``, which takes no inverse of C. (SVD-LLM,
arXiv 2403.07378, gets to the same product by the Cholesky factor of C.)

All work is in float64 from the eigenvectors of a Gram matrix of the shorter side: much faster than a full
decomposition. Squaring costs half the digits of the small singular values, which leaves more than a float32 weight
has. From `LARGE` rows and columns on, ranks of up to an eighth come from random subspace iteration (Halko et al.,
arXiv 0909.4061): its squared error is within 1 % of the least one where the spectrum decays at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 1536  # an exact decomposition takes a few seconds there, and eight times that at twice the size
PASSES = 4  # of subspace iteration
DAMPING = 1e-6  # of the mean of C's diagonal: directions that never come in are told apart by their plain energy


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Nested factors of a matrix.

    Attributes:
        left: ``(a, R)``.
        right: ``(R, b)``.
        energy: ``(R,)`` what each rank adds, descending.
        total: energy of the whole matrix.
    """

    left: Tensor
    right: Tensor
    energy: Tensor
    total: float


def split(matrix: Tensor, moments: Tensor | None = None, columns: int | None = None) -> Split:
    """The nested factors of a float64 matrix.

    Args:
        matrix: ``(a, b)``.
        moments: ``(b, b)`` or None for the identity; of any rank.
        columns: by random subspace iteration, good for ranks somewhat below it; None for the exact ones.

    >>> exact = split(torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)))
    >>> exact.energy.round().tolist()
    [9.0, 4.0, 1.0]
    >>> (exact.left[:, :2] @ exact.right[:2]).round().abs().diag().tolist()
    [3.0, 0.0, 2.0]
    """
    seen_by = None if moments is None else damped(moments)
    seen = matrix if seen_by is None else matrix @ seen_by
    total = float((seen * matrix).sum())
    if columns is not None:
        left, energy = _leading(matrix, seen_by, columns)
    elif len(matrix) <= matrix.shape[1]:
        energy, left = eigenvectors(seen @ matrix.T)
    else:
        root, inverse = (None, None) if seen_by is None else roots(seen_by)
        core = matrix if root is None else matrix @ root
        energy, right = eigenvectors(core.T @ core)
        return Split(core @ right, right.T if inverse is None else right.T @ inverse, energy, total)
    return Split(left, left.T @ matrix, energy, total)


def eigenvectors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a positive semidefinite matrix, descending and not negative, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """``L`` with ``L Lᵀ = C`` for damped moments, and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    stretch = values.clamp(min=DAMPING * float(moments.diagonal().mean())).sqrt()  # rounding may be below the damping
    return vectors * stretch, (vectors / stretch).T


def damped(moments: Tensor) -> Tensor:
    """C with a little of the identity; the identity itself for a layer that never sees anything."""
    mean = float(moments.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(moments), dtype=torch.float64)
    return moments.double() + DAMPING * mean * torch.eye(len(moments), dtype=torch.float64)


def _leading(matrix: Tensor, moments: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
    """The first eigenvectors of ``A·C·Aᵀ``, by subspace iteration from the same random start every time."""

    def seen(basis: Tensor) -> Tensor:
        turned = matrix.T @ basis
        return turned if moments is None else moments @ turned

    start = torch.randn(len(matrix), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(start).Q
    for _ in range(PASSES):
        basis = torch.linalg.qr(matrix @ seen(basis)).Q
    energy, turn = eigenvectors((matrix.T @ basis).T @ seen(basis))
    return basis @ turn, energy


def columns_for(rank: int, shorter: int) -> int | None:
    """Columns to iterate on for a rank, the same for many ranks so that they share them; None for exact factors.

    >>> columns_for(20, shorter=4096), columns_for(20, shorter=64)
    (64, None)
    """
    wanted = rank + max(rank // 4, 8)
    columns = max(64, 1 << (wanted - 1).bit_length())
    return columns if shorter >= LARGE and columns <= shorter // 4 and rank <= shorter // 8 else None
