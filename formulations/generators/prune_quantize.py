"""Pruning and quantization (or any other options of a part) as a quadratic multiple-choice knapsack.

Given tables: what every option does to the loss alone, what it costs, and a factor whose products are the
second-order terms between options of different parts. The objective is the predicted loss increase,

    Σ_v cost[v]·x_v + Σ_{u<v, different parts} (F·Fᵀ)[u,v]·x_u·x_v,

with cost measured or ``½‖F_v‖²`` (arXiv 2307.05657 measures such terms pair by pair; a Gram factor of the outputs'
changes gives all of them at linear cost).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from formulations.pairs import PairTerms
from formulations.problem import Problem


def prune_quantize(
    parts: Sequence[str],
    options: Sequence[Sequence[str]],
    cost: ArrayLike,
    resources: Mapping[str, ArrayLike],
    budgets: Mapping[str, float],
    *,
    factor: ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
    offset: float = 0.0,
) -> Problem:
    """Build the problem of choosing one option per part.

    Args:
        parts: G names.
        options: per part the names of its options; V in all, numbered flat.
        cost: ``(V,)`` loss increase of each option alone.
        resources: name → ``(V,)`` use of each option.
        budgets: name → the most the whole model may use, with the fixed part.
        factor: ``(V, r)``; chosen options u, v of different parts add ``factor[u]·factor[v]``.
        fixed: name → use of everything that is not chosen about, so that usage and budgets are those of the whole
            model.
        offset: added to the objective of every choice.

    Raises:
        InvalidProblemError: the tables do not fit together.

    >>> problem = prune_quantize(
    ...     ["conv"], [["keep", "4 bits"]], [0, 0.1], {"bytes": [40, 5]}, {"bytes": 20}, fixed={"bytes": 8}
    ... )
    >>> problem.groups, problem.minimum_usage()
    (('conv',), {'bytes': 13.0})
    """
    pairs = None if factor is None else PairTerms(factor=np.asarray(factor, dtype=np.float64))
    return Problem(parts, options, cost, resources, budgets, pairs, offset, fixed or {})
