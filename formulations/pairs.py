"""Pair terms: the amount that two options of different groups add to the objective together.

The matrix ``Q = S + F·Fᵀ`` over the flat options is never formed. ``S`` is sparse and strictly upper triangular;
``F`` is a thin factor of shape ``(V, r)``, so evaluating a whole choice takes ``O(G·r)``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InvalidProblemError


@dataclass(frozen=True, slots=True, eq=False)
class PairTerms:
    """Pair terms in which chosen options ``u < v`` of different groups add ``sparse[u, v] + factor[u]·factor[v]``.

    Args:
        sparse: ``(V, V)`` scipy sparse matrix or array, strictly upper triangular, or None.
        factor: ``(V, r)`` array, or None. Products inside one group are never counted. The array is copied unless it
            is a read-only float64 array that owns its memory (this avoids a copy at a million options).

    Raises:
        InvalidProblemError: a shape is wrong, an entry is on or below the diagonal, or a number is not finite.

    >>> import numpy as np
    >>> PairTerms(factor=np.ones((4, 2))).rank
    2
    """

    sparse: Any = None  # scipy.sparse.csr_array (V, V) once constructed; scipy has no common static type
    factor: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.sparse is not None:
            object.__setattr__(self, "sparse", _checked_sparse(self.sparse))
        if self.factor is not None:
            object.__setattr__(self, "factor", _checked_factor(self.factor))
        if self.sparse is not None and self.factor is not None and self.sparse.shape[0] != self.factor.shape[0]:
            raise InvalidProblemError(
                f"pair terms disagree on the number of options: sparse has {self.sparse.shape[0]}, "
                f"factor has {self.factor.shape[0]}"
            )

    @classmethod
    def trusted(cls, *, sparse: Any, factor: NDArray[np.float64] | None) -> "PairTerms":
        """Build terms from parts that were checked before, without copying or checking them again."""
        terms = object.__new__(cls)
        object.__setattr__(terms, "sparse", sparse)
        object.__setattr__(terms, "factor", factor)
        return terms

    @property
    def num_options(self) -> int | None:
        """Number of options V, or None when there is neither a sparse part nor a factor."""
        if self.factor is not None:
            return int(self.factor.shape[0])
        return None if self.sparse is None else int(self.sparse.shape[0])

    @property
    def rank(self) -> int:
        """Number of columns of the factor (0 without a factor)."""
        return 0 if self.factor is None else int(self.factor.shape[1])

    @property
    def num_sparse(self) -> int:
        """Number of stored entries of the sparse part."""
        return 0 if self.sparse is None else int(self.sparse.nnz)

    def __bool__(self) -> bool:
        """Whether any pair term may differ from zero."""
        return self.rank > 0 or self.num_sparse > 0


def _checked_sparse(sparse: Any) -> Any:
    if not scipy.sparse.issparse(sparse):
        raise InvalidProblemError(
            f"sparse pair terms must be a scipy.sparse matrix, found {type(sparse).__name__}; "
            "wrap a dense array as scipy.sparse.csr_array(np.triu(Q, 1))"
        )
    matrix = scipy.sparse.csr_array(sparse, dtype=np.float64, copy=True)
    try:
        matrix.check_format()
    except ValueError as error:
        raise InvalidProblemError(f"sparse pair terms are not a valid sparse matrix: {error}") from error
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InvalidProblemError(f"sparse pair terms must have shape (V, V), found {matrix.shape}")
    if not np.isfinite(matrix.data).all():
        raise InvalidProblemError("sparse pair terms must be finite numbers")
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    if (matrix.indices <= rows).any():
        raise InvalidProblemError(
            "sparse pair terms must be strictly upper triangular (row < column): "
            "add the two halves and keep scipy.sparse.triu(Q, 1)"
        )
    for array in (matrix.data, matrix.indices, matrix.indptr):
        array.flags.writeable = False
    return matrix


def _checked_factor(factor: ArrayLike) -> NDArray[np.float64]:
    lasting = isinstance(factor, np.ndarray) and factor.flags.owndata and not factor.flags.writeable
    try:
        array = np.array(factor, dtype=np.float64, order="C", copy=None if lasting else True)
    except (TypeError, ValueError) as error:
        raise InvalidProblemError(f"the factor of the pair terms must be numbers: {error}") from error
    if array.ndim != 2:
        raise InvalidProblemError(f"the factor of the pair terms must have shape (V, r), found {array.shape}")
    if not np.isfinite(array).all():
        raise InvalidProblemError("the factor of the pair terms must hold finite numbers")
    array.flags.writeable = False
    return array
