"""State a `Problem` as a nonlinear model of dwave-optimization, with one integer decision per group.

Costs and uses are tables that the decisions index. The factor is kept as ``½‖Σ_g F[x_g]‖² − ½ Σ_g ‖F[x_g]‖²``, so the
model has a constant number of nodes and ``O(V·r)`` numbers, where a quadratic model has ``O(V²)``. Sparse pair terms
become one table per pair of groups that interact. Entry g of the decision is the local option of group g, so every
state of the model is a choice.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.problem import Problem, limit_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedNonlinear:
    """A nonlinear model, with maps between its states and choices.

    Attributes:
        model: the ``dwave.optimization.Model``.
        decision: the only decision of the model, an integer symbol of shape ``(G,)``.
    """

    model: Any
    decision: Any = field(repr=False)

    def encode(self, choice: ArrayLike) -> NDArray[np.int64]:
        """Convert a choice ``(G,)`` to a state of the decision, which is the choice itself."""
        return self.decode(choice)

    def decode(self, state: ArrayLike) -> NDArray[np.int64]:
        """Convert a state of the decision to a choice ``(G,)``.

        Raises:
            EncodingError: the state does not hold one whole number per group.
        """
        array = np.asarray(state)
        if array.shape != self.decision.shape() or not (array == np.floor(array)).all():
            raise EncodingError(f"a state holds {self.decision.shape()[0]} whole numbers, found shape {array.shape}")
        return array.astype(np.int64)

    def choices(self) -> NDArray[np.int64]:
        """Return the choices ``(n, G)`` of all states of the locked model."""
        states = [self.decode(self.decision.state(state)) for state in range(self.model.states.size())]
        return np.array(states, dtype=np.int64).reshape(len(states), -1)


def to_nonlinear(problem: Problem) -> EncodedNonlinear:
    """State a problem as a nonlinear model.

    Raises:
        EncodingError: dwave-optimization is not installed.

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_nonlinear(problem)
    >>> with encoded.model.lock():
    ...     encoded.model.states.resize(1)
    ...     encoded.decision.set_state(0, [0, 1])
    ...     print(encoded.model.objective.state(0), encoded.model.feasible(0), encoded.choices().tolist())
    1.0 True [[0, 1]]
    """
    try:
        from dwave.optimization import Model
    except ImportError as error:
        raise EncodingError("a nonlinear model needs dwave-optimization: pip install 'qcompress[dwave]'") from error
    problem.require_linear_budgets("the nonlinear model")
    model, problem = Model(), problem.without_fixed()
    starts, most = problem.group_offsets[:-1], np.diff(problem.group_offsets) - 1
    decision = model.integer(problem.num_groups, lower_bound=np.zeros(len(most)), upper_bound=most)
    chosen = decision + model.constant(starts)
    reach = int(starts.max() + most.max())  # the model assumes that sums of the largest values can occur

    def table(values: NDArray[np.float64], last: int = reach) -> Any:
        rows = max(last + 1, 2) - len(values)  # a table of one number would be treated as a scalar
        return model.constant(np.concatenate([values, np.zeros((rows, *values.shape[1:]))]))

    objective = table(_own_cost(problem))[chosen].sum() + model.constant(problem.offset)
    if problem.pairs.factor is not None and problem.pairs.rank:
        total = table(problem.pairs.factor)[chosen, :].sum(axis=0)
        objective = objective + model.constant(0.5) * (total @ total)
    if problem.pairs.num_sparse:
        values, start, first, second = _pair_tables(problem)
        width = most[second] + 1
        place = decision[model.constant(first)] * model.constant(width) + decision[model.constant(second)]
        last = int(start.max() + most.max() * width.max() + most.max())
        objective = objective + table(values, last)[place + model.constant(start)].sum()
    model.minimize(objective)
    for name, budget in problem.budgets.items():
        used = table(problem.resources[name])[chosen].sum()
        model.add_constraint(used <= model.constant(limit_of(budget)))
    return EncodedNonlinear(model=model, decision=decision)


def _own_cost(problem: Problem) -> NDArray[np.float64]:
    """Return the costs ``(V,)`` minus half the squared norms of the factor's rows, which ``½‖Σ F‖²`` adds."""
    if problem.pairs.factor is None:
        return problem.cost
    return np.asarray(problem.cost - 0.5 * np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor))


def _pair_tables(problem: Problem) -> tuple[NDArray[Any], ...]:
    """Return the sparse pair terms as one table per pair of groups: all entries, the start of each, its two groups."""
    half = scipy.sparse.coo_array(problem.pairs.sparse)
    sizes, starts = np.diff(problem.group_offsets), problem.group_offsets
    above, beside = problem.group_of[half.row], problem.group_of[half.col]
    keys, block = np.unique(above * problem.num_groups + beside, return_inverse=True)
    first, second = np.divmod(keys, problem.num_groups)
    ends = np.cumsum(sizes[first] * sizes[second])
    start = np.concatenate([[0], ends[:-1]])
    values = np.zeros(ends[-1])
    values[start[block] + (half.row - starts[above]) * sizes[beside] + half.col - starts[beside]] = half.data
    return values, start, first, second
