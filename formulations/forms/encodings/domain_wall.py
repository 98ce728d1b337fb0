"""Domain-wall encoding (Chancellor, arXiv:1903.05068): a bit per boundary between options that are ordered by use.

All bits left of the chosen option's position are 1. One flip moves to the next option and is never penalised. Option i
is ``b_i − b_{i+1}``, and the penalty ``P_g`` is paid for each of the m_g walls in the wrong direction.

**Sufficient penalties.** Group g has m_g + 1 options at +1 and m_g at −1. Replace it by a random option of the former:
x − x' = m_g·(p⁺ − p⁻) with p⁺, p⁻ averages over options. Let S_gh be the largest spread of the pair terms of one option
of h with the options of g, and M_h the largest possible number of wrong walls in h. An average of h's options pays at
most S_gh for p⁺ − p⁻, and (p⁺ − p⁻)_h, a difference of two averages, at most twice the smaller of S_gh and S_hg. With
m_g·m_h ≤ (m_g·M_h + m_h·M_g)/2, the expected energy falls by at least

    Σ_g m_g·(P_g − spread of g's costs − Σ_h (S_gh + M_h·min(S_gh, S_hg)))
"""

import numpy as np

from formulations.forms.couplings import Couplings, Floats
from formulations.forms.encodings.code import Code, places, sparse
from formulations.forms.penalties import above, extremes, largest
from formulations.forms.quadratic import Quadratic
from formulations.problem import Problem


def encode(
    form: Quadratic, problem: Problem, cost: Floats, pairs: Couplings, strength: float | Floats, worth: float
) -> tuple[Quadratic, Code, Floats]:
    """Return the form in bits, the code, and the penalty of every group; arguments as in `one_hot.encode`."""
    penalty = strength * sufficient(problem, cost, pairs) + worth
    code = _walls(problem, cost)
    return form.substituted(code.matrix, code.constant) + _no_wrong_walls(problem, penalty), code, penalty


def sufficient(problem: Problem, cost: Floats, pairs: Couplings) -> Floats:
    """Return penalties ``(G,)`` on wrong walls that make every ground state valid."""
    sizes, num_groups, num_options = np.diff(problem.group_offsets), problem.num_groups, problem.num_options
    rows, columns, values = pairs
    felt = problem.group_of[np.concatenate([rows, columns])] * num_options + np.concatenate([columns, rows])
    keys, least, most = extremes(felt, np.concatenate([values, values]), lambda keys: sizes[keys // num_options])
    group, other_group = keys // num_options, problem.group_of[keys % num_options]
    blocks, spread = largest(group * num_groups + other_group, most - least)  # S_gh
    left, right = blocks // num_groups, blocks % num_groups
    mirror = np.searchsorted(blocks, right * num_groups + left)  # the mirror image of a block is also a block
    wrong = (sizes - 1) // 2
    felt_by = np.bincount(left, spread + wrong[right] * np.minimum(spread, spread[mirror]), minlength=num_groups)
    return above(np.maximum.reduceat(cost, problem.group_offsets[:-1]) + felt_by, cost)


def _no_wrong_walls(problem: Problem, penalty: Floats) -> Quadratic:
    """Return ``Σ_g P_g·Σ_i b_{i+1}·(1 − b_i)`` over neighbouring bits of each group."""
    group_of_bit = np.repeat(np.arange(problem.num_groups), np.diff(problem.group_offsets) - 1)
    second = np.flatnonzero(group_of_bit[1:] == group_of_bit[:-1]) + 1
    linear = np.zeros(len(group_of_bit))
    linear[second] = penalty[group_of_bit[second]]
    return Quadratic.of(linear, [(second - 1, second, -penalty[group_of_bit[second]])], 0.0)


def _walls(problem: Problem, cost: Floats) -> Code:
    """Return the code in which option i is b_i − b_{i+1}, with a fixed 1 before the first bit and 0 after the last."""
    order = places(problem, cost)
    starts, ends = problem.group_offsets[:-1], problem.group_offsets[1:]
    place = np.arange(problem.num_options)
    bit = place - problem.group_of - 1  # the bit to the left of a position (the first has none)
    has_left, has_right = ~np.isin(place, starts), ~np.isin(place, ends - 1)
    rows = np.concatenate([order[has_left], order[has_right]])
    columns = np.concatenate([bit[has_left], bit[has_right] + 1])
    values = np.concatenate([np.ones(has_left.sum()), -np.ones(has_right.sum())])
    shape = (problem.num_options, problem.num_options - problem.num_groups)
    constant = np.zeros(problem.num_options)
    constant[order[starts]] = 1.0
    before = (
        place - problem.group_offsets[problem.group_of]
    )  # number of bits that are on: all bits left of the position
    rank = np.arange(before.sum()) - np.repeat(np.cumsum(before) - before, before)
    words = sparse(np.ones(len(rank)), np.repeat(order, before), np.repeat(bit - before + 1, before) + rank, shape)
    return Code(matrix=sparse(values, rows, columns, shape), constant=constant, words=words, bits=np.arange(shape[1]))
