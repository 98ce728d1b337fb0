"""Binary-coded: the place of a group's option, in the order of use, as a number of ``ceil(log2 n)`` bits.

**Exact for whatever numbers the options have.** Over the codes 0 … n−1 every function is a sum of the monomials
m_S = Π_{i in S} b_i with S a code below n (the codes' subsets are codes below n too): the indicator of option v is
``x_v = Σ_{S ⊇ v} (−1)^(|S|−|v|)·m_S``, so cost, use and pair terms become linear and quadratic in these n − 1
monomials. A monomial of several bits is an auxiliary bit only where

- it meets another variable, that is where the pair terms with other groups (or a budget by slack bits) are no
  polynomial of lower degree in the code, or
- another monomial is built on it: m_S = m_A·b with b the lowest bit of S and A the rest;

otherwise it is written out as the coupling m_A·b. So two options take one bit; options whose numbers are affine in
the place (bit-widths in steps, bits removed) take ceil(log2 n) bits and no auxiliary one; arbitrary numbers take
n − 1 variables, as many as the domain-wall encoding, and then also carry its disadvantage twice: more penalties.

**Penalties.** An auxiliary bit is tied by Rosenberg's ``P_S·(m_A·b − 2·m_A·m_S − 2·b·m_S + 3·m_S)``, which is 0 when
m_S = m_A·b and at least P_S when not. A code is n or more exactly when for a zero bit i of n − 1 this bit and all
ones of n − 1 above it (H_i) are on; each is forbidden by ``P_i·m_{H_i}·b_i``.

**What is sufficient.** Take any state; x_g = e_v + Σ of *modes*, vectors over the options of g that add up to 0: for
each wrong monomial (compared with the product of its bits) ± its column, and for a code c ≥ n the extrapolation x(c)
less the last option e_{n−1}. Replacing all groups by their valid e_v changes the energy, mode by mode, by at most

    D_μ = |μ·cost| + Σ_h max_{u in h} |μ·Q_u| + ½·Σ_h Σ_{ν of h} |μ·Q·ν|       (of a group's codes the largest only)

A wrong monomial has a violated one in the chain it is built on, and a code c ≥ n pays for some i, or m_{H_i} is
wrong. So ``P_i`` above the largest D of a code, and ``P_S`` above the D of all monomials built on S (plus that of a
code, when S is in the chain of an H_i), make every ground state valid. High monomials are high differences of the
options' numbers: where these are smooth, the penalties are small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations.errors import EncodingError
from formulations.forms.couplings import MAX_PAIRS, Couplings, Floats, Integers
from formulations.forms.encodings.code import Code, places, sparse
from formulations.forms.penalties import above, largest
from formulations.forms.quadratic import Quadratic
from formulations.problem import Problem

MOST_OPTIONS = 1024
"""Options of one group: their differences of high order are beyond what floating point and annealers resolve."""

ROUNDING = 1e-12
"""A coefficient this small, relative to the absolute terms it is the sum of, is 0."""

Flags = NDArray[np.bool_]


def encode(
    form: Quadratic, problem: Problem, cost: Floats, pairs: Couplings, strength: float | Floats, worth: float
) -> tuple[Quadratic, Code, Floats]:
    """The form in bits, the code, and the largest penalty of every group; arguments as `one_hot.encode`.

    Raises:
        EncodingError: a group of more than `MOST_OPTIONS`; too many couplings, since groups that are coupled may be
            so in all their monomials.
    """
    _refuse_too_large(problem, pairs)
    letters, order = _Letters.of(problem), places(problem, cost)
    matrix = _tiled(problem, order, letters.starts, _indicators)
    constant = np.zeros(problem.num_options)
    constant[order[problem.group_offsets[:-1]]] = 1.0
    full = _cleaned(form, matrix, constant)
    forbidden = _forbidden(problem, letters)
    needed, wanted = _needed(full, letters, forbidden)
    tie, forbid = _sufficient(problem, letters, order, matrix, cost, pairs, wanted, forbidden)
    each = np.broadcast_to(strength, problem.num_groups)
    tie, forbid = each[letters.group] * tie + worth, each * forbid + worth
    group, prefix, bit = forbidden
    held = [_rosenberg(letters, needed, tie), (prefix, bit, forbid[group])]
    folded = np.flatnonzero(wanted & ~needed)
    held.append((letters.rest[folded], letters.bit[folded], full.linear[folded]))
    linear = np.zeros(len(letters.code))
    linear[folded] = -full.linear[folded]
    products = needed & letters.composed
    linear[products] += 3 * tie[products]
    kept = np.flatnonzero(needed)
    extra_bits = np.arange(len(letters.code), len(full.linear))
    energy = (full + Quadratic.of(linear, held, 0.0)).selected(np.concatenate([kept, extra_bits]))
    code = Code(
        matrix=matrix,
        constant=constant,
        words=_tiled(problem, order, letters.starts, lambda size: _subsets(size).T),
        bits=kept,
        products=letters.levels(~needed),
    )
    penalty = np.zeros(problem.num_groups)
    np.maximum.at(penalty, letters.group[products], tie[products])
    np.maximum.at(penalty, group, forbid[group])
    return energy, code, penalty


@dataclass(frozen=True, slots=True, eq=False)
class _Letters:
    """The monomials of all groups: of each group those of the codes 1 … n − 1, in this order."""

    starts: Integers  # (G,) first letter of every group
    group: Integers
    code: Integers
    rest: Integers  # the letter of the code without its lowest bit; itself for a single bit
    bit: Integers  # the letter of the lowest bit

    @classmethod
    def of(cls, problem: Problem) -> "_Letters":
        sizes = np.diff(problem.group_offsets) - 1
        starts = np.cumsum(sizes) - sizes
        group = np.repeat(np.arange(problem.num_groups), sizes)
        code = np.arange(len(group)) - starts[group] + 1
        lowest = code & -code
        rest = np.where(code == lowest, code, code - lowest)
        return cls(starts, group, code, starts[group] + rest - 1, starts[group] + lowest - 1)

    @property
    def composed(self) -> Flags:
        """Which are products of several bits."""
        return np.asarray(self.rest != self.bit)

    def levels(self, wanted: Flags) -> tuple[Integers, ...]:
        """``(letter, rest, bit)`` of the ``wanted`` letters, those of the fewest bits first, ``(3, n)`` each."""
        sizes = np.bitwise_count(self.code)
        chosen = (np.flatnonzero(wanted & (sizes == size)) for size in range(2, int(sizes.max(initial=0)) + 1))
        return tuple(np.stack([members, self.rest[members], self.bit[members]]) for members in chosen)


def _refuse_too_large(problem: Problem, pairs: Couplings) -> None:
    sizes = np.diff(problem.group_offsets)
    if sizes.max() > MOST_OPTIONS:
        raise EncodingError(
            f"a binary code is for at most {MOST_OPTIONS} options a group, found {sizes.max()}; use 'domain-wall'"
        )
    coupled = np.unique(problem.group_of[pairs[0]] * problem.num_groups + problem.group_of[pairs[1]])
    count = int((sizes[coupled // problem.num_groups] * sizes[coupled % problem.num_groups]).sum())
    if count > MAX_PAIRS // 4:  # what is derived from them takes four times the memory
        raise EncodingError(
            f"binary codes of these groups make up to {count} couplings, more than {MAX_PAIRS // 4}; use 'domain-wall'"
        )


def _subsets(size: int, codes: Integers | None = None) -> Floats:
    """``(size - 1, codes)``: whether a monomial S = 1 … size − 1 is 1 at a code: whether S ⊆ code."""
    codes = np.arange(size) if codes is None else codes
    letters = np.arange(1, size)[:, None]
    return np.asarray((letters & codes) == letters, dtype=np.float64)


def _indicators(size: int) -> Floats:
    """``(size, size - 1)``: the coefficient of monomial S in the indicator of a code: ±1 where code ⊆ S."""
    codes, letters = np.arange(size)[:, None], np.arange(1, size)
    sign = 1.0 - 2.0 * (np.bitwise_count(letters & ~codes) % 2)
    return np.asarray(np.where(codes & letters == codes, sign, 0.0))


def _extrapolations(size: int) -> Floats:
    """``(size, unused codes)``: what the options' indicators come to at a code ≥ size, less the last option."""
    unused = np.arange(size, 1 << int(size - 1).bit_length())
    weights = _indicators(size) @ _subsets(size, unused)
    weights[0] += 1.0
    weights[-1] -= 1.0
    return weights


def _tiled(problem: Problem, order: Integers, starts: Integers, block: Callable[[int], Floats]) -> Any:
    """Blocks ``block(options of the group)``, rows by place, columns from ``starts``, as a sparse matrix ``(V, …)``."""
    sizes = np.diff(problem.group_offsets)
    values, rows, columns, width = [], [], [], 0
    for size in np.unique(sizes):
        matrix, groups = block(int(size)), np.flatnonzero(sizes == size)
        row, column = np.nonzero(matrix)
        values.append(np.tile(matrix[row, column], len(groups)))
        rows.append(order[problem.group_offsets[groups][:, None] + row].ravel())
        columns.append((starts[groups][:, None] + column).ravel())
        width = max(width, int(starts[groups[-1]]) + matrix.shape[1])
    shape = (problem.num_options, width)
    return sparse(np.concatenate(values), np.concatenate(rows), np.concatenate(columns), shape)


def _cleaned(form: Quadratic, matrix: Any, constant: Floats) -> Quadratic:
    """``form`` in all monomials, squares as linear terms, and without what is rounding alone."""
    exact = form.substituted(matrix, constant)
    absolute = Quadratic(np.abs(form.linear), abs(form.matrix), 0.0).substituted(abs(matrix), constant)
    both = scipy.sparse.csr_array(exact.matrix.multiply(abs(exact.matrix) > ROUNDING * absolute.matrix))
    diagonal = both.diagonal()
    linear = exact.linear + diagonal
    linear[np.abs(linear) <= ROUNDING * (absolute.linear + absolute.matrix.diagonal())] = 0.0
    both = scipy.sparse.csr_array(both - scipy.sparse.diags_array(diagonal))
    both.eliminate_zeros()
    return Quadratic(linear, both, exact.offset)


def _forbidden(problem: Problem, letters: _Letters) -> tuple[Integers, Integers, Integers]:
    """``(group, letter of H_i, letter of bit i)`` for every zero bit i of every group's n − 1."""
    last = np.diff(problem.group_offsets) - 1
    terms = []
    for i in range(int(last.max()).bit_length() - 1):
        group = np.flatnonzero((last >> i & 1 == 0) & (last >> i > 0))
        above = last[group] >> (i + 1) << (i + 1)
        terms.append(np.stack([group, letters.starts[group] + above - 1, letters.starts[group] + (1 << i) - 1]))
    group, prefix, bit = np.concatenate(terms, axis=1) if terms else np.zeros((3, 0), dtype=np.int64)
    return group, prefix, bit


def _needed(full: Quadratic, letters: _Letters, forbidden: tuple[Integers, Integers, Integers]) -> tuple[Flags, Flags]:
    """Which letters have to be variables, and which occur in the energy at all."""
    num = len(letters.code)
    couplings = scipy.sparse.coo_array(full.matrix)
    coupled = np.zeros(len(full.linear), dtype=bool)
    coupled[couplings.row] = coupled[couplings.col] = True
    wanted = coupled[:num] | (full.linear[:num] != 0)
    needed = coupled[:num] | ~letters.composed
    needed[forbidden[1]] = True
    needed[letters.rest[wanted]] = True
    for letter, rest, _ in reversed(letters.levels(letters.composed)):
        needed[rest[needed[letter]]] = True
    return needed, wanted


def _sufficient(
    problem: Problem,
    letters: _Letters,
    order: Integers,
    matrix: Any,
    cost: Floats,
    pairs: Couplings,
    wanted: Flags,
    forbidden: tuple[Integers, Integers, Integers],
) -> tuple[Floats, Floats]:
    """Penalties that are enough: of every letter's tie, and of every group's forbidden codes."""
    num_groups, num_options, sizes = problem.num_groups, problem.num_options, np.diff(problem.group_offsets)
    unused = np.array([(1 << int(size - 1).bit_length()) - size for size in sizes])
    codes = _tiled(problem, order, np.cumsum(unused) - unused, _extrapolations)
    code_group = np.repeat(np.arange(num_groups), unused)
    wrong = np.flatnonzero(wanted & letters.composed)
    modes = scipy.sparse.csr_array(scipy.sparse.hstack([matrix[:, wrong], codes[:, : len(code_group)]]))
    num_modes = modes.shape[1]
    half = sparse(pairs[2], pairs[0], pairs[1], (num_options, num_options))
    felt = scipy.sparse.coo_array((half + half.T) @ modes)
    change = np.abs(modes.T @ cost)
    keys, most = largest(felt.col.astype(np.int64) * num_groups + problem.group_of[felt.row], np.abs(felt.data))
    change += np.bincount(keys // num_groups, most, minlength=num_modes)
    kind = np.concatenate([np.arange(len(wrong)), len(wrong) + code_group])
    kinds = len(wrong) + num_groups
    both = scipy.sparse.coo_array(modes.T @ felt)
    keys, most = largest(both.row.astype(np.int64) * kinds + kind[both.col], np.abs(both.data))
    change += 0.5 * np.bincount(keys // kinds, most, minlength=num_modes)

    forbid = np.zeros(num_groups)
    np.maximum.at(forbid, code_group, change[len(wrong) :])
    tie, in_chain = np.zeros(len(letters.code)), np.zeros(len(letters.code), dtype=bool)
    tie[wrong] = change[: len(wrong)]
    in_chain[forbidden[1]] = True
    for letter, rest, _ in reversed(letters.levels(letters.composed)):
        np.add.at(tie, rest, tie[letter])
        in_chain[rest[in_chain[letter]]] = True
    tie += np.where(in_chain, forbid[letters.group], 0.0)
    return above(tie, cost), above(forbid, cost)


def _rosenberg(letters: _Letters, needed: Flags, tie: Floats) -> Couplings:
    """The couplings of ``P·(A·b − 2·A·S − 2·b·S + 3·S)``; the linear part is 3·P."""
    tied = np.flatnonzero(needed & letters.composed)
    rest, bit, weight = letters.rest[tied], letters.bit[tied], tie[tied]
    return (
        np.concatenate([rest, rest, bit]),
        np.concatenate([bit, tied, tied]),
        np.concatenate([weight, -2 * weight, -2 * weight]),
    )
