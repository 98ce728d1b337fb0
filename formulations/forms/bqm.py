"""A `Problem` as a binary quadratic model (QUBO), for annealers and every other dimod sampler.

"One option per group" is written in bits by an encoding, each in a module of `formulations.forms.encodings`:
**one-hot** (a bit per option), **domain-wall** (a bit per boundary between neighbouring options) and **binary** (the
option's place as a number). Each keeps groups valid by penalties whose size is derived. Each budget is held by slack
bits (exact) or by a price per unit (a Lagrange multiplier, which keeps the model sparse; the caller looks for the right
price, as solver 'sa' does by bisection).

With slack bits a broken budget must not pay off either. Let R be the most that the objectives of two valid choices can
differ: all penalties grow by R, and the squared excess costs R per unit², so that whatever is invalid or over budget
lies above every choice within the budgets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.forms.couplings import Couplings, Floats, Integers, pair_couplings
from formulations.forms.encodings import ENCODINGS, Code
from formulations.forms.penalties import MARGIN, objective_range
from formulations.forms.quadratic import Quadratic
from formulations.forms.slack import SlackRow
from formulations.problem import Problem

if TYPE_CHECKING:
    import dimod  # imported by what builds a model: asking what is available must not

__all__ = ["ENCODINGS", "EncodedBqm", "SlackRow", "pair_couplings", "to_bqm"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedBqm:
    """A binary quadratic model and the way back.

    Attributes:
        bqm: variables ``0, 1, …``: first those of the groups in order, then the slack bits.
        encoding: the encoding's name.
        penalty: ``(G,)`` largest penalty of every group, in the objective's unit.
        cost: ``(V,)`` cost of each option, prices included; decides what decode takes where a sample leaves it open.
        pairs: the pair terms of the options, expanded.
        code: what the groups' bits mean.
        slack: the budgets that are held by slack bits.
    """

    bqm: "dimod.BinaryQuadraticModel"
    encoding: str
    penalty: Floats
    cost: Floats = field(repr=False)
    group_offsets: Integers = field(repr=False)
    pairs: Couplings = field(repr=False)
    code: Code = field(repr=False)
    slack: tuple[SlackRow, ...] = field(repr=False)

    def encode(self, choice: ArrayLike) -> NDArray[np.int8]:
        """The sample: values of the variables that mean ``choice`` ``(G,)``, slack bits filled up to the budgets."""
        chosen = np.asarray(choice, dtype=np.int64) + self.group_offsets[:-1]
        return np.concatenate([self.code.state(chosen), *(row.state(chosen) for row in self.slack)])

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
        on = self._options_on(samples) > 0
        starts = self.group_offsets[:-1]
        order = np.argsort(self.cost, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        key = np.where(on, rank, rank + len(rank))  # first those that are on, then by cost
        least = np.minimum.reduceat(key, starts, axis=1)
        return np.asarray(order[least % len(rank)] - starts)

    def valid(self, samples: ArrayLike) -> NDArray[np.bool_]:
        """Which of the samples ``(n, variables)`` mean exactly one option in every group."""
        return np.asarray(self.valid_groups(samples).all(axis=1))

    def valid_groups(self, samples: ArrayLike) -> NDArray[np.bool_]:
        """Mark the groups ``(n, G)`` in which the samples ``(n, variables)`` mean exactly one option."""
        on = np.add.reduceat(self._options_on(samples) != 0, self.group_offsets[:-1], axis=1, dtype=np.int64)
        return np.asarray(on == 1)

    def ising(self) -> tuple[Floats, Any]:
        """Biases ``(n,)`` and couplings ``(n, n)``, sparse, the upper triangle, for spins ±1 in place of bits 1 and 0.

        The constant is left out.
        """
        linear, (rows, columns, values), _ = self.bqm.to_numpy_vectors(range(self.bqm.num_variables))
        half = scipy.sparse.csr_array((values / 4, (rows, columns)), shape=(len(linear), len(linear)))
        half.eliminate_zeros()
        return linear / 2 + half.sum(axis=0) + half.sum(axis=1), half

    def _options_on(self, samples: ArrayLike) -> Floats:
        array = np.asarray(samples)
        if array.ndim != 2 or array.shape[1] != self.bqm.num_variables:
            raise EncodingError(
                f"a sample has one value for each of {self.bqm.num_variables} variables, found shape {array.shape}"
            )
        return self.code.options_on(array[:, : self.code.num_bits])


def to_bqm(
    problem: Problem,
    encoding: str = "one-hot",
    *,
    prices: Mapping[str, float] | None = None,
    strength: float | Floats = 1.0,
    couplings: Couplings | None = None,
) -> EncodedBqm:
    """Encode a problem as a binary quadratic model.

    Args:
        problem: what to encode; products of a factor are expanded, one coupling per pair of options.
        encoding: "one-hot" (V bits), "domain-wall" (V - G bits) or "binary" (ceil(log2 n) bits for a group of n
            options, and as many auxiliary bits as their numbers need, V - G in all at most).
        prices: None: budgets hold by slack bits; this couples all options, and the uses must be whole multiples of
            a common unit. Otherwise name of a budget → objective per unit of its resource (≥ 0): the model's ground
            state is the best choice at these prices, which may break a budget or leave some of it unspent.
        strength: penalties relative to the proven ones, of all groups or ``(G,)`` of each. Below 1 the proof is gone,
            but annealers move better.
        couplings: ``pair_couplings(problem)``, for callers that encode one problem at many prices.

    Raises:
        EncodingError: unknown encoding; too many pairs or options for it; uses without a common
            unit; a price missing or negative.

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_bqm(problem)
    >>> import dimod
    >>> encoded.bqm.num_variables, encoded.decode(dimod.ExactSolver().sample(encoded.bqm).first.sample).tolist()
    (5, [0, 1])
    """
    problem.require_linear_budgets("to_bqm")
    if encoding not in ENCODINGS:
        raise EncodingError(f"no encoding is called {encoding!r}; known: {', '.join(ENCODINGS)}")
    problem = problem.without_fixed()
    cost = np.array(problem.cost) + (0.0 if prices is None else _priced(problem, prices))
    lowest = np.minimum.reduceat(cost, problem.group_offsets[:-1])
    shifted = cost - lowest[problem.group_of]
    rows = [SlackRow.of(problem, name) for name in problem.budgets] if prices is None else []
    pairs = pair_couplings(problem, complete=bool(rows)) if couplings is None else couplings
    worth = MARGIN * (objective_range(problem, shifted, pairs) or 1.0) if rows else 0.0
    offset = problem.offset + float(lowest.sum())
    if prices is not None:
        offset -= sum(price * problem.budgets[name] for name, price in prices.items())
    linear, quadratic = shifted, [pairs]
    for row in rows:
        variables = np.concatenate([np.flatnonzero(row.weights), len(linear) + np.arange(len(row.bits))])
        weights = np.concatenate([row.weights[row.weights != 0], row.bits])
        linear = np.concatenate([linear, np.zeros(len(row.bits))])
        linear[variables] -= 2 * worth * row.target * weights
        i, j = np.triu_indices(len(weights))
        doubled = np.where(i == j, 1.0, 2.0)
        quadratic.append((variables[i], variables[j], doubled * worth * weights[i] * weights[j]))
        offset += worth * row.target**2
    form = Quadratic.of(linear, quadratic, offset)
    energy, code, penalty = ENCODINGS[encoding](form, problem, shifted, pairs, strength, worth)
    return EncodedBqm(
        bqm=energy.bqm(),
        encoding=encoding,
        penalty=penalty,
        cost=cost,
        group_offsets=problem.group_offsets,
        pairs=pairs,
        code=code,
        slack=tuple(rows),
    )


def _priced(problem: Problem, prices: Mapping[str, float]) -> Floats:
    if set(prices) != set(problem.budgets):
        raise EncodingError(f"prices must name the budgets {sorted(problem.budgets)}, found {sorted(prices)}")
    for name, price in prices.items():
        if not (np.isfinite(price) and price >= 0):
            raise EncodingError(f"the price of {name!r} must be a finite number ≥ 0, found {price!r}")
    return sum((price * problem.resources[name] for name, price in prices.items()), np.zeros(problem.num_options))
