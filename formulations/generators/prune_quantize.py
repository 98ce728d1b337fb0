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

from formulations.errors import InvalidProblemError
from formulations.pairs import PairTerms
from formulations.problem import Problem

FIXED = "(fixed)"


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
        fixed: name → use of everything that is not chosen about. It becomes a last group ``"(fixed)"`` with one
            option, so that usage and budgets are those of the whole model.
        offset: added to the objective of every choice.

    Raises:
        InvalidProblemError: the tables do not fit together.

    >>> problem = prune_quantize(
    ...     ["conv"], [["keep", "4 bits"]], [0, 0.1], {"bytes": [40, 5]}, {"bytes": 20}, fixed={"bytes": 8}
    ... )
    >>> problem.groups, problem.minimum_usage()
    (('conv', '(fixed)'), {'bytes': 13.0})
    """
    rest = dict(fixed or {})
    if unknown := set(rest) - set(resources):
        raise InvalidProblemError(
            f"fixed use of {sorted(unknown)} names no resource; there are: {', '.join(resources)}"
        )
    pairs = None
    if factor is not None:
        rows = np.asarray(factor, dtype=np.float64)
        if rows.ndim != 2:
            raise InvalidProblemError(f"factor must have shape (V, r), found {rows.shape}")
        pairs = PairTerms(factor=np.vstack([rows, np.zeros((1, rows.shape[1]))]))
    return Problem(
        [*parts, FIXED],
        [*options, ["as is"]],
        np.append(np.asarray(cost, dtype=np.float64), 0.0),
        {name: np.append(np.asarray(use, dtype=np.float64), rest.get(name, 0.0)) for name, use in resources.items()},
        budgets,
        pairs,
        offset=offset,
    )
