"""How large the penalties of a QUBO have to be, so that its ground state is a valid choice; derived, not guessed.

Costs are shifted so that the cheapest option of every group costs 0.

**One-hot**, penalty ``P_g·(Σ x_v − 1)²``. Take any x; let n_g of group g's options be on. Replace it by a valid x':
a group with n_g ≥ 1 keeps a random one of those that are on, an empty group takes one fixed option v. Write
m = n − 1 and let −β_gh be the least negative pair term between g and h (0 if there is none). The expected energy of
x' lies below that of x by at least

    Σ_{n_g ≥ 1} m_g²·(P_g − (3/2)·Σ_h β_gh)  +  Σ_{n_g = 0} (P_g − cost_v − Σ_h max(0, max_{u in h} Q_vu))

because E[Q(x'_g, x'_h)] is the mean of the n_g·n_h pair terms that x pays, n_g·n_h − 1 = m_g + m_h + m_g·m_h, and
2·m_g·m_h ≤ m_g² + m_h². So a P_g above both brackets makes every ground state valid.

**Domain-wall**, penalty ``P_g`` for each of the m_g walls that go the wrong way (Chancellor, arXiv:1903.05068). Then
group g has m_g + 1 options at +1 and m_g at −1; replace it by a random one of the former: x − x' = m_g·(p⁺ − p⁻) with
p⁺, p⁻ averages over options. With R_gh the spread of the pair terms between g and h (0 included), M_h the most wrong
walls that h can have, and m_g·m_h ≤ (m_g·M_h + m_h·M_g)/2, the expected energy falls by at least

    Σ_g m_g·(P_g − spread of g's costs − Σ_h R_gh·(1 + M_h))
"""

import numpy as np
from numpy.typing import NDArray

from formulations.problem import Problem

MARGIN = 1.01
"""What a penalty is raised by above what is just sufficient, so that rounding cannot make it insufficient."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Couplings = tuple[Integers, Integers, Floats]
"""Pair terms ``(u, v, value)`` of options of different groups, u < v."""


def one_hot_penalty(problem: Problem, cost: Floats, pairs: Couplings) -> Floats:
    """Per group ``(G,)`` a penalty that makes every ground state valid (see the module's page).

    Args:
        problem: whose groups.
        cost: ``(V,)``, 0 for the cheapest option of every group.
        pairs: the problem's pair terms.
    """
    num_groups, group_of = problem.num_groups, problem.group_of
    rows, columns, values = pairs
    option, other = np.concatenate([rows, columns]), group_of[np.concatenate([columns, rows])]
    most = _grouped_max(option * num_groups + other, np.concatenate([values, values]))
    filling = cost + np.bincount(most[0] // num_groups, weights=most[1], minlength=len(cost))
    fill = np.minimum.reduceat(filling, problem.group_offsets[:-1])
    gain = _grouped_max(group_of[rows] * num_groups + group_of[columns], -values)
    left, right = gain[0] // num_groups, gain[0] % num_groups
    beta = np.bincount(left, gain[1], minlength=num_groups) + np.bincount(right, gain[1], minlength=num_groups)
    sufficient = np.maximum(fill, 1.5 * beta)
    return _above(sufficient, cost)


def domain_wall_penalty(problem: Problem, cost: Floats, pairs: Couplings) -> Floats:
    """Per group ``(G,)`` a penalty on every wrong wall that makes every ground state valid; as `one_hot_penalty`."""
    starts, sizes = problem.group_offsets[:-1], np.diff(problem.group_offsets)
    num_groups, group_of = problem.num_groups, problem.group_of
    rows, columns, values = pairs
    keys = group_of[rows] * num_groups + group_of[columns]
    blocks, most = _grouped_max(keys, values)
    _, least = _grouped_max(keys, -values)
    spread, left, right = most + least, blocks // num_groups, blocks % num_groups
    wrong = 1 + (sizes - 1) // 2
    felt = np.bincount(left, spread * wrong[right], minlength=num_groups)
    felt = felt + np.bincount(right, spread * wrong[left], minlength=num_groups)
    return _above(np.maximum.reduceat(cost, starts) + felt, cost)


def _above(sufficient: Floats, cost: Floats) -> Floats:
    """Strictly above ``sufficient``, and above zero, which would leave groups free to be empty."""
    floor = 1e-3 * max(float(sufficient.max()), float(cost.max())) or 1.0
    return np.asarray(MARGIN * np.maximum(sufficient, floor))


def objective_range(problem: Problem, cost: Floats, pairs: Couplings) -> float:
    """At least how far the objectives of two choices can lie apart: spreads of costs and of pair terms, summed."""
    spread = np.maximum.reduceat(cost, problem.group_offsets[:-1]).sum()
    rows, columns, values = pairs
    keys = problem.group_of[rows] * problem.num_groups + problem.group_of[columns]
    return float(spread + _grouped_max(keys, values)[1].sum() + _grouped_max(keys, -values)[1].sum())


def _grouped_max(keys: Integers, values: Floats) -> tuple[Integers, Floats]:
    """Keys that hold all of ``keys``, and for each the largest of its values, not below 0."""
    if not len(keys):
        return keys, values
    if keys.max() < 8 * len(keys):  # most keys occur: a table is faster than sorting
        table = np.zeros(int(keys.max()) + 1)
        np.maximum.at(table, keys, values)
        return np.arange(len(table)), table
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return distinct, np.maximum(np.maximum.reduceat(values[order], starts), 0.0)
