"""Limits for outlying effects: one sample's probe must not decide an option's cost.

The cost of an option is half the mean square of its effects, one per sample (see `weight_gradients`). In language
models some samples have effects dozens of times as large as all others, where a layer's output is one huge number
that every later layer normalises: the loss is far from quadratic there, and the true increase is a small part of the
predicted one. A mean of squares would consist of such a sample alone.

The squares of an option are therefore limited to `LARGEST` times the mean of the limited squares (scale and limit solve
one equation: Huber, Proposal 2, doi:10.1214/aoms/1177703732). Normally distributed effects hardly ever reach that
limit, and fewer than ten samples never do. Samples without an effect do not count, so that a part that few samples use
keeps its cost; nor does a cost become lower than its mean by more than its standard error.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST = 9.0
"""Largest square of an effect relative to the mean of the limited squares: three standard deviations."""


def limited(effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``(options, samples)`` effects with the outlying ones limited.

    >>> effects = np.ones((1, 20))
    >>> effects[0, 7] = -100
    >>> limited(effects)[0, 6:9].round(2).tolist()
    [1.0, -3.94, 1.0]
    """
    num_samples = effects.shape[1]
    if num_samples <= LARGEST:
        return effects
    squares = np.square(effects)
    limit = _limits(squares)
    within = np.minimum(squares, limit[:, None])
    mean = within.mean(axis=1)
    least = squares.mean(axis=1) - squares.std(axis=1, ddof=1) / num_samples**0.5
    raised = np.sqrt(np.divide(least, mean, out=np.ones_like(mean), where=least > mean))
    shrunk = np.where(squares <= limit[:, None], effects, np.copysign(np.sqrt(within), effects))
    return np.asarray(shrunk * raised[:, None])


def _limits(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``(options,)`` limits of the squares, which solve ``limit = LARGEST · mean(min(squares, limit))``.

    With the m largest of n squares limited, and S the sum of the others, ``limit = LARGEST · S / (n - LARGEST · m)``;
    m is the smallest number for which the limit is not below the largest of the others.
    """
    rising = np.sort(squares, axis=1)
    sums, counts = rising.cumsum(axis=1), np.count_nonzero(squares, axis=1)
    limit = np.full(len(squares), np.inf)
    for number in range(int((squares.shape[1] - 1) // LARGEST) + 1):
        left = counts - LARGEST * number
        new = np.divide(LARGEST * sums[:, -1 - number], left, out=np.full(len(squares), np.inf), where=left > 0)
        limit = np.where(np.isinf(limit) & (rising[:, -1 - number] <= new), new, limit)
    return limit
