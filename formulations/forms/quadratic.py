"""Quadratic functions to build binary quadratic models from, with sums and linear substitutions of variables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from formulations.forms.couplings import Couplings, Floats, Integers

if TYPE_CHECKING:
    import dimod  # at run time only the functions that build a model import it


@dataclass(frozen=True, slots=True, eq=False)
class Quadratic:
    """The function ``offset + linear·x + xᵀ·matrix·x``; the matrix need not be triangular."""

    linear: Floats
    matrix: Any  # scipy.sparse.csr_array
    offset: float

    @classmethod
    def of(cls, linear: Floats, parts: list[Couplings], offset: float) -> "Quadratic":
        """Build the function from lists of couplings, which add up."""
        rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        size = len(linear)
        return cls(linear, scipy.sparse.csr_array((values, (rows, columns)), shape=(size, size)), offset)

    def __add__(self, other: "Quadratic") -> "Quadratic":
        """Add two functions; ``other`` may have fewer variables."""
        matrix, linear = other.matrix.copy(), np.zeros(len(self.linear))
        matrix.resize(self.matrix.shape)
        linear[: len(other.linear)] = other.linear
        return Quadratic(self.linear + linear, self.matrix + matrix, self.offset + other.offset)

    def substituted(self, matrix: Any, constant: Floats) -> "Quadratic":
        """Return the function of b, with x = matrix·b + constant for the first variables and the others unchanged."""
        num_unchanged = len(self.linear) - len(constant)
        extended = scipy.sparse.csr_array(scipy.sparse.block_diag([matrix, scipy.sparse.eye_array(num_unchanged)]))
        fixed = np.concatenate([constant, np.zeros(num_unchanged)])
        linear = extended.T @ (self.linear + self.matrix @ fixed + self.matrix.T @ fixed)
        offset = self.offset + self.linear @ fixed + fixed @ (self.matrix @ fixed)
        return Quadratic(linear, extended.T @ self.matrix @ extended, float(offset))

    def selected(self, variables: Integers) -> "Quadratic":
        """Return the function of the given variables, in this order, with the others set to 0."""
        return Quadratic(self.linear[variables], self.matrix[variables][:, variables], self.offset)

    def bqm(self) -> "dimod.BinaryQuadraticModel":
        """Return the function as a model of bits, for which x² = x."""
        import dimod

        both = scipy.sparse.coo_array(scipy.sparse.triu(self.matrix + self.matrix.T, 1))
        both.eliminate_zeros()
        linear = self.linear + self.matrix.diagonal()
        couplings = (both.row, both.col, both.data)
        return dimod.BinaryQuadraticModel.from_numpy_vectors(linear, couplings, self.offset, dimod.BINARY)
