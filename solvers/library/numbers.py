"""Recognise a generated problem on other processors, where the last bits of its numbers may differ.

NumPy's exponential gives other last bits on processors with other instructions, so no digest of all bits identifies a
generated problem. Its names, sizes and pattern of pair terms are the same everywhere and are compared by a digest; its
numbers, of chosen and unchosen options alike, by one weighted sum of each array.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import PairTerms, Problem

SAME = 1e-12
"""Largest difference of two sums, relative to the sum of absolute values, that last bits may explain."""

GOLDEN = 0.6180339887498949  # its multiples spread evenly, so no two options have the same weight


def pattern(problem: Problem) -> str:
    """Return a SHA-256 of all of a problem but the values of its numbers.

    >>> one, two = (Problem(["a"], [["x", "y"]], [0, cost], {}, {}) for cost in (1, 2))
    >>> pattern(one) == pattern(two), one.fingerprint() == two.fingerprint()
    (True, False)
    """
    sparse, factor = problem.pairs.sparse, problem.pairs.factor
    return problem.derived(
        cost=np.ones(problem.num_options),
        resources={name: np.ones(problem.num_options) for name in problem.resources},
        budgets=dict.fromkeys(problem.budgets, 1.0),
        pairs=PairTerms(
            sparse=None if sparse is None else _ones(sparse), factor=None if factor is None else np.ones_like(factor)
        ),
        offset=1.0,
        fixed=dict.fromkeys(problem.fixed, 1.0),
        resource_pairs={name: _ones(terms) for name, terms in problem.resource_pairs.items()},
    ).fingerprint()


def sums(problem: Problem) -> dict[str, float]:
    """Return a weighted sum of each of the problem's arrays of numbers, by name; the weights are from 1 to 2.

    >>> sums(Problem(["a"], [["x", "y"]], [1, 0], {"bytes": [8, 0]}, {"bytes": 4}, offset=2.0))
    {'offset': 2.0, 'cost': 1.0, 'use of bytes': 8.0, 'budget of bytes': 4.0}
    """
    return {name: float(np.sum(_weights(values) * values)) for name, values in _numbers(problem)}


def same_numbers(problem: Problem, recorded: Mapping[str, float]) -> bool:
    """Whether the problem's sums are the recorded ones, up to last bits."""
    here = sums(problem)
    room = {name: SAME * float(np.sum(_weights(values) * np.abs(values))) for name, values in _numbers(problem)}
    return here.keys() == recorded.keys() and all(abs(here[name] - recorded[name]) <= room[name] for name in here)


def _numbers(problem: Problem) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Name and values of each array of numbers, and of each single number."""
    yield "offset", np.array([problem.offset])
    yield "cost", problem.cost
    yield from ((f"use of {name}", use) for name, use in problem.resources.items())
    yield from ((f"budget of {name}", np.array([budget])) for name, budget in problem.budgets.items())
    yield from ((f"fixed use of {name}", np.array([use])) for name, use in problem.fixed.items())
    if problem.pairs.sparse is not None:
        yield "pair terms", problem.pairs.sparse.data
    if problem.pairs.factor is not None:
        yield "factor", np.ravel(problem.pairs.factor)
    yield from ((f"pair terms of {name}", terms.data) for name, terms in problem.resource_pairs.items())


def _weights(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 + np.arange(len(values)) * GOLDEN % 1.0, dtype=np.float64)


def _ones(matrix: Any) -> Any:
    ones = matrix.copy()
    ones.data = np.ones_like(matrix.data)
    return ones
