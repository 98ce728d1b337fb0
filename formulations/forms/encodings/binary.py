"""Binary encoding: the position of a group's option, in the order of use, as a number of ``ceil(log2 n)`` bits.

**Exactness for arbitrary numbers.** Over the codes 0 … n−1 every function is a sum of monomials m_S = Π_{i in S} b_i
with S a code below n (subsets of such codes are codes below n too). The indicator of option v is
``x_v = Σ_{S ⊇ v} (−1)^(|S|−|v|)·m_S``, so cost, use and pair terms become linear and quadratic in these n − 1
monomials. A monomial of several bits becomes an auxiliary bit only if

- it is multiplied with another variable, that is, if the pair terms with other groups (or a budget with slack bits)
  are not a polynomial of lower degree in the code, or
- another monomial is built on it: m_S = m_A·b with b the lowest bit of S and A the rest.

Otherwise it is written as the coupling m_A·b. Two options therefore take one bit. Options whose numbers are affine in
the position (evenly spaced bit-widths, bits removed) take ceil(log2 n) bits and no auxiliary bit. Arbitrary numbers
take n − 1 variables, as many as the domain-wall encoding, and need more penalties.

**Penalties.** Rosenberg's term ``P_S·(m_A·b − 2·m_A·m_S − 2·b·m_S + 3·m_S)`` ties an auxiliary bit to its product: it
is 0 if m_S = m_A·b, and at least P_S otherwise. A code is n or more exactly if, for some zero bit i of n − 1, bit i and
all one bits of n − 1 above it (H_i) are on. Each of these cases is forbidden by ``P_i·m_{H_i}·b_i``.

**Sufficient penalties.** For any state, x_g = e_v + Σ of *modes*, which are vectors over the options of g that sum to
0: for each wrong monomial (one that differs from the product of its bits) ± its column, and for a code c ≥ n the
extrapolation x(c) minus the last option e_{n−1}. Replacing all groups by their valid e_v changes the energy, for each
mode μ, by at most

    D_μ = |μ·cost| + Σ_h max_{u in h} |μ·Q_u| + ½·Σ_h Σ_{ν of h} |μ·Q·ν|       (only the largest code of a group counts)

For each wrong monomial, some monomial in the chain it is built on violates its tie. For a code c ≥ n, the penalty of
some i is paid or m_{H_i} is wrong. Every ground state is therefore valid if ``P_i`` exceeds the largest D of a code,
and ``P_S`` exceeds the sum of D over all monomials built on S (plus that of a code, if S is in the chain of an H_i).
High monomials are high-order differences of the options' numbers: if these numbers are smooth, the penalties are small.
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
"""Maximum number of options of a group; differences of higher order exceed the precision of floats and annealers."""

ROUNDING = 1e-12
"""A coefficient smaller than this, relative to the sum of the absolute values of its terms, is treated as 0."""

Flags = NDArray[np.bool_]


def encode(
    form: Quadratic, problem: Problem, cost: Floats, pairs: Couplings, strength: float | Floats, worth: float
) -> tuple[Quadratic, Code, Floats]:
    """Return the form in bits, the code, and the largest penalty of every group; arguments as in `one_hot.encode`.

    Raises:
        EncodingError: a group has more than `MOST_OPTIONS` options, or there are too many couplings (coupled groups may
            be coupled in all their monomials).
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
    """The monomials ("letters") of all groups: for each group those of the codes 1 … n − 1, in this order."""

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
        """Flags of the letters that are products of several bits."""
        return np.asarray(self.rest != self.bit)

    def levels(self, wanted: Flags) -> tuple[Integers, ...]:
        """Return arrays ``(3, n)``: letter, rest and bit for the ``wanted`` letters, one array per number of bits."""
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
    if count > MAX_PAIRS // 4:  # derived arrays take four times the memory
        raise EncodingError(
            f"binary codes of these groups make up to {count} couplings, more than {MAX_PAIRS // 4}; use 'domain-wall'"
        )


def _subsets(size: int, codes: Integers | None = None) -> Floats:
    """Return whether each monomial S = 1 … size − 1 is 1 at each code (S ⊆ code), ``(size - 1, codes)``."""
    codes = np.arange(size) if codes is None else codes
    letters = np.arange(1, size)[:, None]
    return np.asarray((letters & codes) == letters, dtype=np.float64)


def _indicators(size: int) -> Floats:
    """Return the coefficient of each monomial S in each code's indicator (±1 if code ⊆ S), ``(size, size - 1)``."""
    codes, letters = np.arange(size)[:, None], np.arange(1, size)
    sign = 1.0 - 2.0 * (np.bitwise_count(letters & ~codes) % 2)
    return np.asarray(np.where(codes & letters == codes, sign, 0.0))


def _extrapolations(size: int) -> Floats:
    """Return the options' indicators at each code ≥ size, minus the last option, ``(size, unused codes)``."""
    unused = np.arange(size, 1 << int(size - 1).bit_length())
    weights = _indicators(size) @ _subsets(size, unused)
    weights[0] += 1.0
    weights[-1] -= 1.0
    return weights


def _tiled(problem: Problem, order: Integers, starts: Integers, block: Callable[[int], Floats]) -> Any:
    """Build a sparse matrix ``(V, …)`` of blocks ``block(group size)``, rows by position, columns from ``starts``."""
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
    """Return ``form`` in all monomials, with squares as linear terms and without rounding errors as coefficients."""
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
    """Return (group, letter of H_i, letter of bit i) for every zero bit i of every group's n − 1."""
    last = np.diff(problem.group_offsets) - 1
    terms = []
    for i in range(int(last.max()).bit_length() - 1):
        group = np.flatnonzero((last >> i & 1 == 0) & (last >> i > 0))
        above = last[group] >> (i + 1) << (i + 1)
        terms.append(np.stack([group, letters.starts[group] + above - 1, letters.starts[group] + (1 << i) - 1]))
    group, prefix, bit = np.concatenate(terms, axis=1) if terms else np.zeros((3, 0), dtype=np.int64)
    return group, prefix, bit


def _needed(full: Quadratic, letters: _Letters, forbidden: tuple[Integers, Integers, Integers]) -> tuple[Flags, Flags]:
    """Return flags of the letters that must be variables, and of those that occur in the energy at all."""
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
    """Return sufficient penalties for the tie of every letter and for the forbidden codes of every group."""
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
    """Return the couplings of ``P·(A·b − 2·A·S − 2·b·S + 3·S)``; the linear part is 3·P."""
    tied = np.flatnonzero(needed & letters.composed)
    rest, bit, weight = letters.rest[tied], letters.bit[tied], tie[tied]
    return (
        np.concatenate([rest, rest, bit]),
        np.concatenate([bit, tied, tied]),
        np.concatenate([weight, -2 * weight, -2 * weight]),
    )
