"""The bits of an encoding and what they mean: from bits to options and back."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.forms.couplings import Floats, Integers
from formulations.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Code:
    """``x = matrix·y + constant``: x counts how often each option is on, y are words' letters, some of them bits.

    Attributes:
        matrix: ``(V, Y)`` sparse.
        constant: ``(V,)``.
        words: ``(V, Y)`` sparse, 0 and 1: the letters that are on when an option is chosen.
        bits: ``(B,)`` the letters that are variables of the model, ascending.
        products: the other letters, in an order in which they can be filled in: arrays ``(3, n)`` of a letter and
            the two letters that it is the product of.
    """

    matrix: Any
    constant: Floats
    words: Any
    bits: Integers
    products: tuple[Integers, ...] = field(default=())

    @property
    def num_bits(self) -> int:
        """B, the number of the model's variables without slack bits."""
        return len(self.bits)

    def options_on(self, states: ArrayLike) -> NDArray[np.float64]:
        """How often each option is on ``(n, V)`` in states ``(n, B)``; not 0 or 1 everywhere when they are invalid."""
        letters = np.zeros((len(np.asarray(states)), self.matrix.shape[1]))
        letters[:, self.bits] = states
        for target, left, right in self.products:
            letters[:, target] = letters[:, left] * letters[:, right]
        return np.asarray((self.matrix @ letters.T).T + self.constant)

    def state(self, chosen: Integers) -> NDArray[np.int8]:
        """The bits ``(B,)`` that choose the flat options ``chosen``."""
        return np.asarray(self.words[chosen].sum(axis=0))[self.bits].astype(np.int8)


def places(problem: Problem, cost: Floats) -> Integers:
    """``(V,)`` flat options by place: in their group by use, every budget in shares of its mean, then by cost."""
    use = np.zeros(problem.num_options)
    for name in problem.budgets:
        use += problem.resources[name] / (problem.resources[name].mean() or 1.0)
    return np.asarray(np.lexsort((cost, use, problem.group_of)))


def sparse(values: ArrayLike, rows: ArrayLike, columns: ArrayLike, shape: tuple[int, int]) -> Any:
    """A sparse matrix from lists."""
    return scipy.sparse.csr_array((np.asarray(values, dtype=np.float64), (rows, columns)), shape=shape)
