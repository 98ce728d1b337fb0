"""A `Problem` as a binary quadratic model (QUBO), for annealers and every other dimod sampler.

One-hot: variable v is 1 when flat option v is chosen. Each group is held to one option by a penalty
``P_g·(Σ x_v − 1)²``, each budget by slack bits (exact) or by a price per unit (a Lagrange multiplier, which keeps
the model sparse; the caller looks for the right price, as solver 'sa' does by bisection).

How large a penalty has to be, with costs shifted so that the cheapest option of every group costs 0. Take any x;
let n_g of group g's options be on. Replace it by a valid x': a group with n_g ≥ 1 keeps a random one of those that
are on, an empty group takes one fixed option v. Write m = n − 1 and let −β_gh be the least negative pair term
between g and h (0 if there is none). The expected energy of x' lies below that of x by at least

    Σ_{n_g ≥ 1} m_g²·(P_g − (3/2)·Σ_h β_gh)  +  Σ_{n_g = 0} (P_g − cost_v − Σ_h max(0, max_{u in h} Q_vu))

because E[Q(x'_g, x'_h)] is the mean of the n_g·n_h pair terms that x pays, n_g·n_h − 1 = m_g + m_h + m_g·m_h, and
2·m_g·m_h ≤ m_g² + m_h². So a P_g above both brackets makes every ground state valid. With slack bits a broken budget
must not pay either: by R, the most that the objective of two valid choices can differ, P_g grows and the squared
excess is weighed per unit², so that whatever is invalid or over budget lies above every choice within the budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dimod
import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.problem import BUDGET_TOLERANCE, Problem

ENCODINGS = ("one-hot",)

MAX_PAIRS = 20_000_000
"""Most pairs of options a model may couple (about 1 GB while it is built)."""

MARGIN = 1.01
"""What a penalty is raised by above what is just sufficient, so that rounding cannot make it insufficient."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Couplings = tuple[Integers, Integers, Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedBqm:
    """A binary quadratic model and the way back.

    Attributes:
        bqm: variables ``0 … V-1`` are the flat options, those from V on the slack bits.
        penalty: ``(G,)`` one-hot penalty of every group, in the objective's unit.
        cost: ``(V,)`` cost of each option, prices included; decides what decode takes where a sample leaves it open.
    """

    bqm: dimod.BinaryQuadraticModel
    penalty: Floats
    cost: Floats = field(repr=False)
    group_offsets: Integers = field(repr=False)

    def decode(self, sample: Mapping[Any, int] | ArrayLike) -> Integers:
        """The choice ``(G,)`` of a sample: a mapping variable → 0/1, or the values in the order of the variables.

        A group with one option on takes it; with several on, the cheapest of them; with none, the cheapest of all.

        Raises:
            EncodingError: the sample does not have the model's variables.
        """
        if isinstance(sample, Mapping):
            try:
                sample = [sample[variable] for variable in self.bqm.variables]
            except KeyError as error:
                raise EncodingError(f"the sample lacks variable {error} of the model") from error
        choice: Integers = self.decode_all(np.asarray(sample)[None, :])[0]
        return choice

    def decode_all(self, samples: ArrayLike) -> Integers:
        """The choices ``(n, G)`` of samples ``(n, variables)`` in the order of the model's variables."""
        on = self._options_on(samples)
        starts = self.group_offsets[:-1]
        order = np.argsort(self.cost, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        key = np.where(on, rank, rank + len(rank))  # first those that are on, then by cost
        least = np.minimum.reduceat(key, starts, axis=1)
        return np.asarray(order[least % len(rank)] - starts)

    def valid(self, samples: ArrayLike) -> NDArray[np.bool_]:
        """Which of the samples ``(n, variables)`` have exactly one option on in every group."""
        counts = np.add.reduceat(self._options_on(samples).astype(np.int64), self.group_offsets[:-1], axis=1)
        return np.asarray((counts == 1).all(axis=1))

    def _options_on(self, samples: ArrayLike) -> NDArray[np.bool_]:
        array = np.asarray(samples)
        if array.ndim != 2 or array.shape[1] != self.bqm.num_variables:
            raise EncodingError(
                f"a sample has one value for each of {self.bqm.num_variables} variables, found shape {array.shape}"
            )
        return np.asarray(array[:, : len(self.cost)] > 0)


def to_bqm(
    problem: Problem,
    encoding: str = "one-hot",
    *,
    prices: Mapping[str, float] | None = None,
    strength: float = 1.0,
    couplings: Couplings | None = None,
) -> EncodedBqm:
    """``problem`` as a binary quadratic model.

    Args:
        problem: what to encode; products of a factor are expanded, one coupling per pair of options.
        encoding: "one-hot".
        prices: None: budgets hold by slack bits; this couples all options, and the uses must be whole multiples of
            a common unit. Otherwise name of a budget → objective per unit of its resource (≥ 0): the model's ground
            state is the best choice at these prices, which may break a budget or leave some of it unspent.
        strength: one-hot penalties relative to the proven ones. Below 1 the proof is gone, but annealers move better.
        couplings: ``pair_couplings(problem)``, for callers that encode one problem at many prices.

    Raises:
        EncodingError: unknown encoding; too many pairs; uses without a common unit; a price missing or negative.

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_bqm(problem)
    >>> encoded.bqm.num_variables, encoded.decode(dimod.ExactSolver().sample(encoded.bqm).first.sample).tolist()
    (5, [0, 1])
    """
    if encoding not in ENCODINGS:
        raise EncodingError(f"no encoding is called {encoding!r}; known are: {', '.join(ENCODINGS)}")
    num_options, starts = problem.num_options, problem.group_offsets[:-1]
    cost = np.array(problem.cost) + (0.0 if prices is None else _priced(problem, prices))
    lowest = np.minimum.reduceat(cost, starts)
    shifted = cost - lowest[problem.group_of]
    complete = prices is None and bool(problem.budgets)
    pairs = pair_couplings(problem, complete=complete) if couplings is None else couplings
    penalty = strength * one_hot_penalty(problem, shifted, pairs)
    offset = problem.offset + float(lowest.sum())
    if prices is not None:
        offset -= sum(price * problem.budgets[name] for name, price in prices.items())
    linear, quadratic = shifted, [pairs]
    if prices is None and problem.budgets:
        worth = MARGIN * (objective_range(problem, shifted, pairs) or 1.0)
        penalty = penalty + worth
        for name in problem.budgets:
            weights, bits, target = _slack_row(problem, name)
            variables = np.concatenate([np.flatnonzero(weights), len(linear) + np.arange(len(bits))])
            weights = np.concatenate([weights[weights != 0], bits])
            linear = np.concatenate([linear, np.zeros(len(bits))])
            linear[variables] += worth * weights * (weights - 2 * target)
            i, j = np.triu_indices(len(weights), 1)
            quadratic.append((variables[i], variables[j], 2 * worth * weights[i] * weights[j]))
            offset += worth * target**2
    first, second = pairs_within_groups(problem.group_offsets)
    quadratic.append((first, second, 2 * penalty[problem.group_of[first]]))
    linear[:num_options] -= penalty[problem.group_of]
    offset += float(penalty.sum())
    rows, columns, values = (np.concatenate(parts) for parts in zip(*quadratic, strict=True))
    bqm = dimod.BinaryQuadraticModel.from_numpy_vectors(linear, (rows, columns, values), offset, dimod.BINARY)
    return EncodedBqm(bqm=bqm, penalty=penalty, cost=cost, group_offsets=problem.group_offsets)


def pair_couplings(problem: Problem, *, complete: bool = False) -> Couplings:
    """The pair terms as ``(u, v, value)`` with u < v, those of a factor expanded.

    Raises:
        EncodingError: more than `MAX_PAIRS` (or would be in a model that couples all options: ``complete``).
    """
    num_options = problem.num_options
    dense = problem.pairs.rank > 0 or complete
    count = num_options * (num_options - 1) // 2 if dense else problem.pairs.num_sparse
    if count > MAX_PAIRS:
        why = "a budget by slack bits couples all options" if complete else "a factor couples all options"
        raise EncodingError(
            f"{why}: {num_options} options make {count} pairs, more than {MAX_PAIRS}; "
            "give prices, keep the pair terms sparse, or use a solver that takes the factor as it is ('anneal', 'auto')"
        )
    sparse = problem.pairs.sparse
    half = scipy.sparse.coo_array((num_options, num_options)) if sparse is None else scipy.sparse.coo_array(sparse)
    rows, columns, values = half.row.astype(np.int64), half.col.astype(np.int64), half.data.astype(np.float64)
    if problem.pairs.factor is None or problem.pairs.rank == 0:
        return rows, columns, values
    product = problem.pairs.factor @ problem.pairs.factor.T
    product[rows, columns] += values
    rows, columns = np.triu_indices(num_options, 1)
    between = problem.group_of[rows] != problem.group_of[columns]
    rows, columns = rows[between], columns[between]
    return rows, columns, product[rows, columns]


def one_hot_penalty(problem: Problem, cost: Floats, pairs: Couplings) -> Floats:
    """Per group ``(G,)`` a penalty that makes every ground state valid (see the module's page).

    Args:
        problem: whose groups.
        cost: ``(V,)``, 0 for the cheapest option of every group.
        pairs: as `pair_couplings` gives them.
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
    floor = 1e-3 * max(float(sufficient.max()), float(cost.max()))  # zero would leave a group free to be empty
    return np.asarray(MARGIN * np.maximum(sufficient, floor or 1.0))


def objective_range(problem: Problem, cost: Floats, pairs: Couplings) -> float:
    """At least how far the objectives of two choices can lie apart: spreads of costs and of pair terms, summed."""
    spread = np.maximum.reduceat(cost, problem.group_offsets[:-1]).sum()
    rows, columns, values = pairs
    keys = problem.group_of[rows] * problem.num_groups + problem.group_of[columns]
    return float(spread + _grouped_max(keys, values)[1].sum() + _grouped_max(keys, -values)[1].sum())


def pairs_within_groups(group_offsets: Integers) -> tuple[Integers, Integers]:
    """All pairs ``u < v`` of options of one group."""
    sizes = np.diff(group_offsets)
    first = [np.zeros(0, dtype=np.int64)]
    second = [np.zeros(0, dtype=np.int64)]
    for size in np.unique(sizes):
        starts = group_offsets[:-1][sizes == size]
        i, j = np.triu_indices(size, 1)
        first.append((starts[:, None] + i).ravel())
        second.append((starts[:, None] + j).ravel())
    return np.concatenate(first), np.concatenate(second)


def _grouped_max(keys: Integers, values: Floats) -> tuple[Integers, Floats]:
    """The distinct keys, and for each the largest of its values, not below 0."""
    if not len(keys):
        return keys, values
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return distinct, np.maximum(np.maximum.reduceat(values[order], starts), 0.0)


def _priced(problem: Problem, prices: Mapping[str, float]) -> Floats:
    if set(prices) != set(problem.budgets):
        raise EncodingError(f"prices must name the budgets {sorted(problem.budgets)}, found {sorted(prices)}")
    for name, price in prices.items():
        if not (np.isfinite(price) and price >= 0):
            raise EncodingError(f"the price of {name!r} must be a finite number ≥ 0, found {price!r}")
    return sum((price * problem.resources[name] for name, price in prices.items()), np.zeros(problem.num_options))


def _slack_row(problem: Problem, name: str) -> tuple[Floats, Floats, float]:
    """Weights ``(V,)`` of the options, weights of the slack bits, and what those that are on must add up to.

    All in whole units of the resource. The slack bits reach every number from 0 to what the smallest choice leaves
    of the budget, and no more.
    """
    use, starts = problem.resources[name], problem.group_offsets[:-1]
    if not (use == np.floor(use)).all() or use.max() > 2**53:
        raise EncodingError(
            f"slack bits need whole numbers, resource {name!r} has fractions: give it in a smaller unit, or give prices"
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
    return weights, np.array(bits, dtype=np.float64), target
