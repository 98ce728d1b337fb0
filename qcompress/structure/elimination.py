"""Elimination of a layer's inputs, unit by unit, while the other weights compensate (optimal brain surgeon).

If a layer with weight ``W`` and second moments ``H`` of its inputs loses the columns of a unit u, and the others
compensate, its outputs lose ``tr(W_u·[H⁻¹]_uu⁻¹·W_uᵀ)``. That needs only ``H⁻¹`` and ``G = Wᵀ·W``, and both change by a
product of two thin matrices with every unit that goes. These products are collected and added `DELAYED` columns at a
time, as in a blocked Cholesky factorisation; only the blocks of each unit on the diagonals are always up to date.
"""

import torch
from torch import Tensor

DELAYED = 64
"""Number of columns of thin products that are collected before they are added."""


class Elimination:
    """A layer whose inputs are eliminated unit by unit.

    Args:
        rows: ``(channels, n)`` weight, in float64.
        moments: ``(n, n)`` damped second moments of the inputs.
        columns: ``(units, p)`` columns of every unit.
    """

    def __init__(self, rows: Tensor, moments: Tensor, columns: Tensor) -> None:
        self._columns = columns
        self._inverse, self._gram = _Delayed(torch.linalg.inv(moments), columns), _Delayed(rows.T @ rows, columns)

    def costs(self) -> Tensor:
        """Return ``(units,)`` costs of eliminating each unit next; those of units that are gone mean nothing."""
        inverse, gram = self._inverse.blocks, self._gram.blocks
        if self._columns.shape[1] == 1:
            return (gram / inverse)[:, 0, 0]
        return torch.diagonal(torch.linalg.solve(inverse, gram), dim1=1, dim2=2).sum(-1)

    def eliminate(self, unit: int) -> None:
        """Eliminate a unit."""
        columns = self._columns[unit]
        across, gram = self._inverse.rows(columns), self._gram.rows(columns)  # (p, n)
        step = torch.linalg.solve(across[:, columns], across)
        self._inverse.subtract(across.T, step)
        self._gram.subtract(torch.cat([step.T, gram.T], 1), torch.cat([gram - gram[:, columns] @ step, step]))
        self._inverse.blocks[unit] = torch.eye(len(columns), dtype=step.dtype)  # it is gone: any regular matrix


class _Delayed:
    """A symmetric matrix from which products of thin matrices are subtracted.

    Args:
        matrix: ``(n, n)``; it is overwritten.
        columns: ``(units, p)`` columns of every unit.

    Attributes:
        blocks: ``(units, p, p)`` blocks of the units on the diagonal.
    """

    def __init__(self, matrix: Tensor, columns: Tensor) -> None:
        self._matrix, self._columns = matrix, columns
        self._left, self._right = matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, len(matrix))
        self.blocks = matrix[columns[:, :, None], columns[:, None, :]]

    def rows(self, columns: Tensor) -> Tensor:
        """Return rows of the matrix, ``(p, n)``."""
        return self._matrix[columns] - self._left[columns] @ self._right

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Subtract ``left @ right``, of shapes ``(n, r)`` and ``(r, n)``."""
        self.blocks -= left[self._columns] @ right[:, self._columns].permute(1, 0, 2)
        self._left, self._right = torch.cat([self._left, left], 1), torch.cat([self._right, right])
        if len(self._right) >= DELAYED:
            self._matrix.addmm_(self._left, self._right, alpha=-1.0)
            self._left, self._right = self._left[:, :0], self._right[:0]
