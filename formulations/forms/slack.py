"""Write a budget as an equation, with slack bits for the unused part."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from formulations.errors import EncodingError
from formulations.forms.couplings import Floats, Integers
from formulations.problem import BUDGET_TOLERANCE, Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlackRow:
    """The equation ``weights·x + bits·slack = target``, all in whole units of the resource.

    The slack bits reach every number from 0 to the part of the budget that the smallest choice leaves unused.
    """

    weights: Floats  # (V,)
    bits: Floats  # weights of the slack bits, descending
    target: float
    unit: float  # of the resource

    @classmethod
    def of(cls, problem: Problem, name: str) -> "SlackRow":
        """Build the row of the budget ``name``.

        Raises:
            EncodingError: the resource has fractions, or no choice meets the budget.
        """
        use, starts = problem.resources[name], problem.group_offsets[:-1]
        if not (use == np.floor(use)).all() or use.max() > 2**53:
            raise EncodingError(
                f"slack bits need whole numbers, resource {name!r} has fractions: "
                "give it in a smaller unit, or give prices"
            )
        unit = float(np.gcd.reduce(use.astype(np.int64))) or 1.0
        weights = use / unit
        target = float(np.floor(problem.budgets[name] / unit * (1 + BUDGET_TOLERANCE)))
        most = int(target - np.minimum.reduceat(weights, starts).sum())
        if most < 0:
            raise EncodingError(f"no choice meets the budget for {name!r}: the smallest use is above it")
        bits = []
        while most > 0:
            bits.append((most + 1) // 2)
            most -= bits[-1]
        return cls(weights=weights, bits=np.array(bits, dtype=np.float64), target=target, unit=unit)

    def state(self, chosen: Integers) -> NDArray[np.int8]:
        """Return the slack bits ``(bits,)`` for what the flat options ``chosen`` leave unused; 0 if nothing is left."""
        unused, on = self.target - self.weights[chosen].sum(), np.zeros(len(self.bits), dtype=np.int8)
        for bit, weight in enumerate(self.bits):
            if weight <= unused:
                on[bit], unused = 1, unused - weight
        return on
