"""Pair terms of resources: the amount that two options of different groups use together, besides their single uses."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms


def checked_resource_pairs(
    given: Mapping[str, Any], resources: Mapping[str, Any], group_of: NDArray[np.int64]
) -> dict[str, Any]:
    """Check pair terms of resources and return the non-empty ones: name of a resource → read-only CSR array.

    Raises:
        InvalidProblemError: a resource is unknown, a shape is wrong, or a term is on or below the diagonal, inside a
            group, negative or not finite.
    """
    checked = {}
    for name, terms in given.items():
        if name not in resources:
            listed = ", ".join(sorted(resources)) or "none"
            raise InvalidProblemError(f"pair terms of {name!r} name no resource of the problem; it has: {listed}")
        try:
            matrix = PairTerms(sparse=terms).sparse
        except InvalidProblemError as error:
            raise InvalidProblemError(f"resource {name!r}: {error}") from error
        if matrix.shape != (len(group_of), len(group_of)):
            raise InvalidProblemError(
                f"pair terms of resource {name!r} are for {matrix.shape[0]} options, the problem has {len(group_of)}"
            )
        if (matrix.data < 0).any():
            raise InvalidProblemError(
                f"pair terms of resource {name!r} must not be negative, found {matrix.data.min():g}"
            )
        rows = np.repeat(np.arange(len(group_of)), np.diff(matrix.indptr))
        if (inside := group_of[rows] == group_of[matrix.indices]).any():
            first = int(np.argmax(inside))
            raise InvalidProblemError(
                f"a pair term of resource {name!r} joins two options of one group (flat options {rows[first]} and "
                f"{matrix.indices[first]}); only one of them is ever chosen, so remove the term"
            )
        if matrix.nnz:
            checked[str(name)] = matrix
    return checked


def least_of_blocks(terms: Any, group_of: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    """Sum, over pairs of groups, the smallest pair term of their options."""
    rows, columns = terms.tocoo().coords
    block = group_of[rows].astype(np.int64) * len(sizes) + group_of[columns]
    order = np.argsort(block, kind="stable")
    names, starts, counts = np.unique(block[order], return_index=True, return_counts=True)
    complete = counts == sizes[names // len(sizes)] * sizes[names % len(sizes)]  # else some pair has no term, i.e. 0
    return float(np.minimum.reduceat(terms.data[order], starts)[complete].sum()) if len(names) else 0.0


def arrays_of(terms: Any, name: str) -> dict[str, NDArray[Any]]:
    """Convert a sparse matrix to named arrays for a file."""
    indices, indptr = terms.indices.astype(np.int64), terms.indptr.astype(np.int64)
    return {f"{name}_data": terms.data, f"{name}_indices": indices, f"{name}_indptr": indptr}


def matrix_from(arrays: Mapping[str, NDArray[Any]], name: str, size: int) -> Any:
    """Invert `arrays_of`; a missing array raises KeyError."""
    parts = (arrays[f"{name}_data"], arrays[f"{name}_indices"], arrays[f"{name}_indptr"])
    return scipy.sparse.csr_array(parts, shape=(size, size))
