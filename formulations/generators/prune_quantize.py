"""Pruning and quantization (or any other options of a part) as a quadratic multiple-choice knapsack.

The tables give, for every option, its effect on the loss when applied alone and its use of each resource, and a factor
whose products are the second-order terms between options of different parts. The objective is the predicted loss
increase,

    Σ_v cost[v]·x_v + Σ_{u<v, different parts} (F·Fᵀ)[u,v]·x_u·x_v,

with a cost that is measured or set to ``½‖F_v‖²``. (arXiv 2307.05657 measures such terms pair by pair; a Gram factor of
the changes in the outputs gives all of them at linear cost.)
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
        parts: names of the G parts.
        options: for each part, the names of its options; V in all, numbered consecutively.
        cost: ``(V,)`` loss increase of each option alone.
        resources: name of a resource → ``(V,)`` use by each option.
        budgets: name of a resource → upper limit on the use by the whole model, including the fixed part.
        factor: ``(V, r)``; chosen options u, v of different parts add ``factor[u]·factor[v]``.
        fixed: name of a resource → use by everything that is not up for choice, so that usage and budgets refer to the
            whole model.
        offset: constant added to the objective of every choice.

    Raises:
        InvalidProblemError: the tables are inconsistent.

    >>> problem = prune_quantize(
    ...     ["conv"], [["keep", "4 bits"]], [0, 0.1], {"bytes": [40, 5]}, {"bytes": 20}, fixed={"bytes": 8}
    ... )
    >>> problem.groups, problem.minimum_usage()
    (('conv',), {'bytes': 13.0})
    """
    pairs = None if factor is None else PairTerms(factor=np.asarray(factor, dtype=np.float64))
    return Problem(parts, options, cost, resources, budgets, pairs, offset, fixed or {})
