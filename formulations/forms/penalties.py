"""What penalties have to outweigh; each encoding derives its own from these (see `formulations.forms.encodings`).

Costs are shifted so that the cheapest option of every group costs 0. What always holds: a penalty is `MARGIN` above
what is proven sufficient, and never 0, which would leave groups free.
"""

from collections.abc import Callable

import numpy as np

from formulations.forms.couplings import Couplings, Floats, Integers
from formulations.problem import Problem

MARGIN = 1.01
"""Factor by which a penalty is raised above what is just sufficient, so that rounding cannot make it insufficient."""


def above(sufficient: Floats, cost: Floats) -> Floats:
    """Strictly above ``sufficient``, and above zero."""
    floor = 1e-3 * max(float(sufficient.max(initial=0.0)), float(cost.max(initial=0.0))) or 1.0
    return np.asarray(MARGIN * np.maximum(sufficient, floor))


def objective_range(problem: Problem, cost: Floats, pairs: Couplings) -> float:
    """An upper bound on how far the objectives of two choices lie apart: spreads of costs and of pair terms, summed."""
    sizes, group_of = np.diff(problem.group_offsets), problem.group_of
    spread = np.maximum.reduceat(cost, problem.group_offsets[:-1]).sum()
    rows, columns, values = pairs
    _, least, most = extremes(
        group_of[rows] * problem.num_groups + group_of[columns],
        values,
        lambda keys: sizes[keys // problem.num_groups] * sizes[keys % problem.num_groups],
    )
    return float(spread + (most - least).sum())


def extremes(keys: Integers, values: Floats, full: Callable[[Integers], Integers]) -> tuple[Integers, Floats, Floats]:
    """Distinct ``keys`` with the least and the largest of their values.

    Args:
        keys: ``(n,)`` non-negative.
        values: ``(n,)``.
        full: a function of distinct keys: how many values each would have were none of them zero and left out;
            a key with fewer has a zero among its values.
    """
    if not len(keys):
        return keys, values, values
    if keys.max() < 8 * len(keys):  # most keys occur: a table is faster than sorting
        counts = np.bincount(keys)
        distinct = np.flatnonzero(counts)
        least, most = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
        np.minimum.at(least, keys, values)
        np.maximum.at(most, keys, values)
        counts, least, most = counts[distinct], least[distinct], most[distinct]
    else:
        order = np.argsort(keys, kind="stable")
        distinct, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
        least, most = (f.reduceat(values[order], starts) for f in (np.minimum, np.maximum))
    lacks = counts < full(distinct)
    return distinct, np.where(lacks, np.minimum(least, 0.0), least), np.where(lacks, np.maximum(most, 0.0), most)


def largest(keys: Integers, values: Floats) -> tuple[Integers, Floats]:
    """Distinct ``keys``, and for each the largest of its values, not below 0."""
    distinct, _, most = extremes(keys, values, lambda keys: np.full(len(keys), np.iinfo(np.int64).max))
    return distinct, most
