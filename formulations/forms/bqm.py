"""Encode a `Problem` as a binary quadratic model (QUBO), for annealers and every other dimod sampler.

An encoding writes "one option per group" in bits (one module each in `formulations.forms.encodings`): **one-hot** (a
bit per option), **domain-wall** (a bit per boundary between neighbouring options) and **binary** (the option's position
as a number). Penalties of a derived size keep the groups valid. Each budget is enforced by slack bits (exactly), by a
price per unit (a Lagrange multiplier, which keeps the model sparse; the caller searches for the right price, as solver
'sa' does by bisection), or by both (`formulations.forms.tight_budgets`).

With slack bits, exceeding a budget must not pay off either. Let R be an upper bound on the difference between the
objectives of two valid choices. All penalties grow by R, and the squared excess costs R per unit², so that every
invalid or infeasible state has a higher energy than every feasible choice.
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
    import dimod  # at run time only the functions that build a model import it

__all__ = ["ENCODINGS", "EncodedBqm", "SlackRow", "pair_couplings", "to_bqm"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedBqm:
    """A binary quadratic model, with maps between its samples and choices.

    Attributes:
        bqm: the model, with variables ``0, 1, …``: first those of the groups in order, then the slack bits.
        encoding: name of the encoding.
        penalty: ``(G,)`` largest penalty of every group, in the objective's unit.
        cost: ``(V,)`` cost of each option including prices; `decode` uses it when a sample is invalid.
        group_offsets: ``(G+1,)`` offsets of the problem's groups.
        pairs: the pair terms of the options, expanded.
        code: the code that maps bits to options.
        slack: rows of the budgets that are enforced by slack bits.
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
        """Convert a choice ``(G,)`` to a sample, with slack bits that fill up the budgets."""
        chosen = np.asarray(choice, dtype=np.int64) + self.group_offsets[:-1]
        return np.concatenate([self.code.state(chosen), *(row.state(chosen) for row in self.slack)])

    def decode(self, sample: Mapping[Any, int] | ArrayLike) -> Integers:
        """Convert a sample to a choice ``(G,)``.

        If several options of a group are on, the cheapest of them is taken; if none is on, the cheapest of the group.

        Args:
            sample: a mapping variable → 0/1, or the values in the order of the variables.

        Raises:
            EncodingError: the sample does not match the model's variables, or holds other values.
        """
        if isinstance(sample, Mapping):
            try:
                sample = [sample[variable] for variable in self.bqm.variables]
            except KeyError as error:
                raise EncodingError(f"the sample lacks variable {error} of the model") from error
        choice: Integers = self.decode_all(as_bits(sample)[None, ...])[0]
        return choice

    def decode_all(self, samples: ArrayLike) -> Integers:
        """Convert samples ``(n, variables)``, in the order of the model's variables, to choices ``(n, G)``."""
        on = self._options_on(samples) > 0
        starts = self.group_offsets[:-1]
        order = np.argsort(self.cost, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        key = np.where(on, rank, rank + len(rank))  # options that are on first, then by cost
        least = np.minimum.reduceat(key, starts, axis=1)
        return np.asarray(order[least % len(rank)] - starts)

    def valid(self, samples: ArrayLike) -> NDArray[np.bool_]:
        """Mark the samples ``(n, variables)`` that have exactly one option on in every group."""
        return np.asarray(self.valid_groups(samples).all(axis=1))

    def valid_groups(self, samples: ArrayLike) -> NDArray[np.bool_]:
        """Mark the groups ``(n, G)`` in which the samples ``(n, variables)`` have exactly one option on."""
        on = np.add.reduceat(self._options_on(samples) != 0, self.group_offsets[:-1], axis=1, dtype=np.int64)
        return np.asarray(on == 1)

    def ising(self) -> tuple[Floats, Any]:
        """Return biases ``(n,)`` and couplings ``(n, n)`` for spins ±1 in place of bits 1 and 0.

        The couplings are a sparse upper triangular matrix. The constant is left out.
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


def as_bits(samples: ArrayLike) -> NDArray[Any]:
    """Return samples as an array of the values 0 and 1.

    Raises:
        EncodingError: there are other values.
    """
    array = np.asarray(samples)
    wrong = np.ones(array.shape, dtype=bool) if array.dtype.kind not in "biuf" else (array != 0) & (array != 1)
    if wrong.any():
        raise EncodingError(f"a sample holds the values 0 and 1, found {array[wrong].tolist()[0]!r}")
    return array


def to_bqm(
    problem: Problem,
    encoding: str = "one-hot",
    *,
    prices: Mapping[str, float] | None = None,
    overrun: Mapping[str, float] | None = None,
    strength: float | Floats = 1.0,
    couplings: Couplings | None = None,
) -> EncodedBqm:
    """Encode a problem as a binary quadratic model.

    Args:
        problem: the problem to encode; products of a factor are expanded, with one coupling per pair of options.
        encoding: "one-hot" (V bits), "domain-wall" (V - G bits) or "binary" (ceil(log2 n) bits for a group of n
            options plus the auxiliary bits that their numbers need, at most V - G in all).
        prices: name of a budget → price per unit of its resource, in units of the objective, ≥ 0. The ground state is
            then the best choice at these prices, which may exceed a budget or leave part of it unused. With None,
            slack bits enforce the budgets; this couples all options, and uses must be multiples of a common unit.
        overrun: name of a budget → price of each squared unit by which use plus slack bits differ from the budget, in
            addition to its price, which is then also paid for what the slack bits leave unused.
        strength: penalties relative to the proven ones, for all groups or ``(G,)`` for each. Below 1 the ground state
            is no longer proven valid, but annealers move more easily.
        couplings: result of ``pair_couplings(problem)``, for callers that encode a problem at many prices.

    Raises:
        EncodingError: the encoding is unknown, there are too many pairs or options, the uses have no common unit, a
            price is missing or negative, or ``overrun`` is given without prices.

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
    squares = _squares(problem, prices, overrun)
    rows = {name: SlackRow.of(problem, name) for name in problem.budgets} if squares != {} else {}
    pairs = pair_couplings(problem, complete=bool(rows)) if couplings is None else couplings
    worth = MARGIN * (objective_range(problem, shifted, pairs) or 1.0) if rows and squares is None else 0.0
    offset = problem.offset + float(lowest.sum())
    linear, quadratic = shifted, [pairs]
    for name, row in rows.items():
        variables = np.concatenate([np.flatnonzero(row.weights), len(linear) + np.arange(len(row.bits))])
        weights = np.concatenate([row.weights[row.weights != 0], row.bits])
        square, price = (worth, 0.0) if squares is None else (squares[name] * row.unit**2, (prices or {})[name])
        linear = np.concatenate([linear, price * row.unit * row.bits])
        offset += square * row.target**2 - price * row.unit * row.target
        linear[variables] -= 2 * square * row.target * weights
        i, j = np.triu_indices(len(weights))
        doubled = np.where(i == j, 1.0, 2.0)
        quadratic.append((variables[i], variables[j], doubled * square * weights[i] * weights[j]))
    if not rows and prices is not None:
        offset -= sum(price * problem.budgets[name] for name, price in prices.items())
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
        slack=tuple(rows.values()),
    )


def _squares(
    problem: Problem, prices: Mapping[str, float] | None, overrun: Mapping[str, float] | None
) -> Mapping[str, float] | None:
    """Return the price of every budget's squared units; None where the proven one is used, empty where none is."""
    if overrun is None:
        return None if prices is None else {}
    if prices is None or set(overrun) != set(problem.budgets):
        raise EncodingError(
            f"overrun must name the budgets {sorted(problem.budgets)} and needs prices, found {sorted(overrun)}"
        )
    return overrun


def _priced(problem: Problem, prices: Mapping[str, float]) -> Floats:
    if set(prices) != set(problem.budgets):
        raise EncodingError(f"prices must name the budgets {sorted(problem.budgets)}, found {sorted(prices)}")
    for name, price in prices.items():
        if not (np.isfinite(price) and price >= 0):
            raise EncodingError(f"the price of {name!r} must be a finite number ≥ 0, found {price!r}")
    return sum((price * problem.resources[name] for name, price in prices.items()), np.zeros(problem.num_options))
