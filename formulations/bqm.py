"""A `Problem` as a binary quadratic model (QUBO), for annealers and every other dimod sampler.

Two encodings of "one option per group": **one-hot**, a bit per option, and **domain-wall**, a bit per boundary
between options that follow each other in use (all bits left of the chosen option's place are 1), where one flip
moves to the next option and is never penalised. Each group is held valid by a penalty whose size is derived in
`formulations.penalties`; each budget by slack bits (exact) or by a price per unit (a Lagrange multiplier, which
keeps the model sparse; the caller looks for the right price, as solver 'sa' does by bisection).

With slack bits a broken budget must not pay either: by R, the most that the objectives of two valid choices can
differ, the penalties grow, and the squared excess is weighed per unit², so that whatever is invalid or over budget
lies above every choice within the budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.penalties import (
    MARGIN,
    Couplings,
    Floats,
    Integers,
    domain_wall_penalty,
    objective_range,
    one_hot_penalty,
)
from formulations.problem import BUDGET_TOLERANCE, Problem

if TYPE_CHECKING:
    import dimod  # imported by what builds a model: asking what is available must not

ENCODINGS = ("one-hot", "domain-wall")

MAX_PAIRS = 20_000_000
"""Most pairs of options a model may couple (about 1 GB while it is built)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedBqm:
    """A binary quadratic model and the way back: ``x = matrix @ bits + constant`` for the first variables.

    Attributes:
        bqm: variables ``0, 1, …``: first those of the groups in order, then the slack bits.
        penalty: ``(G,)`` penalty of every group, in the objective's unit.
        cost: ``(V,)`` cost of each option, prices included; decides what decode takes where a sample leaves it open.
    """

    bqm: "dimod.BinaryQuadraticModel"
    penalty: Floats
    cost: Floats = field(repr=False)
    group_offsets: Integers = field(repr=False)
    matrix: Any = field(repr=False)  # scipy.sparse.csr_array (V, bits)
    constant: Floats = field(repr=False)

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
        """Which of the samples ``(n, variables)`` mean exactly one option in every group."""
        counts = np.add.reduceat(self._options_on(samples).astype(np.int64), self.group_offsets[:-1], axis=1)
        return np.asarray((counts == 1).all(axis=1))

    def _options_on(self, samples: ArrayLike) -> NDArray[np.bool_]:
        array = np.asarray(samples)
        if array.ndim != 2 or array.shape[1] != self.bqm.num_variables:
            raise EncodingError(
                f"a sample has one value for each of {self.bqm.num_variables} variables, found shape {array.shape}"
            )
        return np.asarray((self.matrix @ array[:, : self.matrix.shape[1]].T).T + self.constant > 0)


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
        encoding: "one-hot" (V bits) or "domain-wall" (V - G bits).
        prices: None: budgets hold by slack bits; this couples all options, and the uses must be whole multiples of
            a common unit. Otherwise name of a budget → objective per unit of its resource (≥ 0): the model's ground
            state is the best choice at these prices, which may break a budget or leave some of it unspent.
        strength: penalties relative to the proven ones. Below 1 the proof is gone, but annealers move better.
        couplings: ``pair_couplings(problem)``, for callers that encode one problem at many prices.

    Raises:
        EncodingError: unknown encoding; too many pairs; uses without a common unit; a price missing or negative.

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_bqm(problem)
    >>> import dimod
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
    sufficient = one_hot_penalty if encoding == "one-hot" else domain_wall_penalty
    penalty = strength * sufficient(problem, shifted, pairs)
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
            linear[variables] -= 2 * worth * target * weights
            i, j = np.triu_indices(len(weights))
            doubled = np.where(i == j, 1.0, 2.0)
            quadratic.append((variables[i], variables[j], doubled * worth * weights[i] * weights[j]))
            offset += worth * target**2
    form = _Quadratic.of(linear, quadratic, offset)
    if encoding == "one-hot":
        matrix, constant = scipy.sparse.eye_array(num_options, format="csr"), np.zeros(num_options)
        held = _exactly_one(problem, penalty)
    else:
        matrix, constant = _walls(problem, cost)
        held = _no_wrong_walls(problem, penalty)
    bqm = (form.substituted(matrix, constant) + held).bqm()
    return EncodedBqm(
        bqm=bqm, penalty=penalty, cost=cost, group_offsets=problem.group_offsets, matrix=matrix, constant=constant
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Quadratic:
    """``offset + linear·x + xᵀ·matrix·x``; the matrix need not be triangular."""

    linear: Floats
    matrix: Any  # scipy.sparse.csr_array
    offset: float

    @classmethod
    def of(cls, linear: Floats, parts: list[Couplings], offset: float) -> "_Quadratic":
        rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        size = len(linear)
        return cls(linear, scipy.sparse.csr_array((values, (rows, columns)), shape=(size, size)), offset)

    def __add__(self, other: "_Quadratic") -> "_Quadratic":
        """The sum; ``other`` may have fewer variables."""
        matrix, linear = other.matrix.copy(), np.zeros(len(self.linear))
        matrix.resize(self.matrix.shape)
        linear[: len(other.linear)] = other.linear
        return _Quadratic(self.linear + linear, self.matrix + matrix, self.offset + other.offset)

    def substituted(self, matrix: Any, constant: Floats) -> "_Quadratic":
        """As a function of b, with x = matrix·b + constant for the first variables and the others unchanged."""
        others = len(self.linear) - len(constant)
        whole = scipy.sparse.csr_array(scipy.sparse.block_diag([matrix, scipy.sparse.eye_array(others)]))
        fixed = np.concatenate([constant, np.zeros(others)])
        linear = whole.T @ (self.linear + self.matrix @ fixed + self.matrix.T @ fixed)
        offset = self.offset + self.linear @ fixed + fixed @ (self.matrix @ fixed)
        return _Quadratic(linear, whole.T @ self.matrix @ whole, float(offset))

    def bqm(self) -> "dimod.BinaryQuadraticModel":
        """For bits, of which each is its own square."""
        import dimod

        both = scipy.sparse.coo_array(scipy.sparse.triu(self.matrix + self.matrix.T, 1))
        both.eliminate_zeros()
        linear = self.linear + self.matrix.diagonal()
        couplings = (both.row, both.col, both.data)
        return dimod.BinaryQuadraticModel.from_numpy_vectors(linear, couplings, self.offset, dimod.BINARY)


def _exactly_one(problem: Problem, penalty: Floats) -> _Quadratic:
    """``Σ_g P_g·(Σ_{v in g} x_v − 1)²``."""
    first, second = pairs_within_groups(problem.group_offsets)
    group_of = problem.group_of
    return _Quadratic.of(-penalty[group_of], [(first, second, 2 * penalty[group_of[first]])], float(penalty.sum()))


def _no_wrong_walls(problem: Problem, penalty: Floats) -> _Quadratic:
    """``Σ_g P_g·Σ_i b_{i+1}·(1 − b_i)`` over neighbouring bits of a group."""
    group_of_bit = np.repeat(np.arange(problem.num_groups), np.diff(problem.group_offsets) - 1)
    second = np.flatnonzero(group_of_bit[1:] == group_of_bit[:-1]) + 1
    linear = np.zeros(len(group_of_bit))
    linear[second] = penalty[group_of_bit[second]]
    return _Quadratic.of(linear, [(second - 1, second, -penalty[group_of_bit[second]])], 0.0)


def _walls(problem: Problem, cost: Floats) -> tuple[Any, Floats]:
    """``matrix (V, V - G)`` and ``constant (V,)`` with x = matrix·b + constant: option i is b_i − b_{i+1}.

    Options follow each other in use (every budget in shares of its mean), those of equal use in cost.
    """
    use = np.zeros(problem.num_options)
    for name in problem.budgets:
        use += problem.resources[name] / (problem.resources[name].mean() or 1.0)
    order = np.lexsort((cost, use, problem.group_of))
    starts, ends = problem.group_offsets[:-1], problem.group_offsets[1:]
    place = np.arange(problem.num_options)
    bit = place - problem.group_of - 1  # the bit to the left of a place, where there is one
    has_left, has_right = ~np.isin(place, starts), ~np.isin(place, ends - 1)
    rows = np.concatenate([order[has_left], order[has_right]])
    columns = np.concatenate([bit[has_left], bit[has_right] + 1])
    values = np.concatenate([np.ones(has_left.sum()), -np.ones(has_right.sum())])
    shape = (problem.num_options, problem.num_options - problem.num_groups)
    constant = np.zeros(problem.num_options)
    constant[order[starts]] = 1.0
    return scipy.sparse.csr_array((values, (rows, columns)), shape=shape), constant


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
    after = problem.group_of[:, None] < problem.group_of[None, :]  # options are numbered group after group
    rows, columns = np.nonzero(after)
    return rows, columns, product[after]


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
