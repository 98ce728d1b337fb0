"""The code of an encoding, which maps bits to options and back."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.forms.couplings import Floats, Integers
from formulations.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Code:
    """The map ``x = matrix·y + constant`` from letters y to x, which counts how often each option is on.

    Each letter is either a bit of the model or a product of two other letters.

    Attributes:
        matrix: ``(V, Y)`` sparse matrix.
        constant: ``(V,)`` constant part of x.
        words: ``(V, Y)`` sparse matrix of 0 and 1 that marks the letters that are on when an option is chosen.
        bits: ``(B,)`` letters that are variables of the model, ascending.
        products: the other letters, in an order in which they can be computed: arrays ``(3, n)`` of a letter and its
            two factors.
    """

    matrix: Any
    constant: Floats
    words: Any
    bits: Integers
    products: tuple[Integers, ...] = field(default=())

    @property
    def num_bits(self) -> int:
        """Number B of the model's variables without slack bits."""
        return len(self.bits)

    def options_on(self, states: ArrayLike) -> NDArray[np.float64]:
        """Count how often each option is on ``(n, V)`` in states ``(n, B)``; other values than 0 and 1 are invalid."""
        letters = np.zeros((len(np.asarray(states)), self.matrix.shape[1]))
        letters[:, self.bits] = states
        for target, left, right in self.products:
            letters[:, target] = letters[:, left] * letters[:, right]
        return np.asarray((self.matrix @ letters.T).T + self.constant)

    def state(self, chosen: Integers) -> NDArray[np.int8]:
        """Return the bits ``(B,)`` that choose the flat options ``chosen``."""
        return np.asarray(self.words[chosen].sum(axis=0))[self.bits].astype(np.int8)


def places(problem: Problem, cost: Floats) -> Integers:
    """Order the flat options ``(V,)`` in each group by use (relative to means, summed over budgets), then by cost."""
    use = np.zeros(problem.num_options)
    for name in problem.budgets:
        use += problem.resources[name] / (problem.resources[name].mean() or 1.0)
    return np.asarray(np.lexsort((cost, use, problem.group_of)))


def sparse(values: ArrayLike, rows: ArrayLike, columns: ArrayLike, shape: tuple[int, int]) -> Any:
    """Build a sparse matrix from lists of values, rows and columns."""
    return scipy.sparse.csr_array((np.asarray(values, dtype=np.float64), (rows, columns)), shape=shape)
