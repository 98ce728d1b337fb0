"""Bounds that penalties must exceed; each encoding derives its penalties from them (`formulations.forms.encodings`).

Costs are shifted so that the cheapest option of every group costs 0. A penalty is `MARGIN` times the value that is
proven sufficient, and never 0, which would leave groups unconstrained.
"""

from collections.abc import Callable

import numpy as np

from formulations.forms.couplings import Couplings, Floats, Integers
from formulations.problem import Problem

MARGIN = 1.01
"""Factor between a penalty and the value that is just sufficient, so that rounding cannot make it insufficient."""


def above(sufficient: Floats, cost: Floats) -> Floats:
    """Return penalties strictly above ``sufficient`` and above zero."""
    floor = 1e-3 * max(float(sufficient.max(initial=0.0)), float(cost.max(initial=0.0))) or 1.0
    return np.asarray(MARGIN * np.maximum(sufficient, floor))


def objective_range(problem: Problem, cost: Floats, pairs: Couplings) -> float:
    """Bound the difference between the objectives of two choices by the summed spreads of costs and pair terms."""
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
    """Return the distinct ``keys`` with the smallest and the largest of their values.

    Args:
        keys: ``(n,)`` keys, not negative.
        values: ``(n,)`` value of each key.
        full: function that returns, for distinct keys, their numbers of values including omitted zeros. A key with
            fewer values has a zero among its values.
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
    """Return the distinct ``keys`` with the largest of their values, at least 0."""
    distinct, _, most = extremes(keys, values, lambda keys: np.full(len(keys), np.iinfo(np.int64).max))
    return distinct, most
