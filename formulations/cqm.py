"""A `Problem` as a constrained quadratic model: discrete constraints for the groups, linear ones for the budgets.

Nothing is penalised: objective and constraints are those of the problem, so that a choice has the same objective
and the same violations in both. What always holds: variable v of the model is flat option v.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.bqm import pair_couplings
from formulations.errors import EncodingError
from formulations.problem import Problem

if TYPE_CHECKING:
    import dimod  # imported by what builds a model: asking what is available must not


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedCqm:
    """A constrained quadratic model and the way back."""

    cqm: "dimod.ConstrainedQuadraticModel"
    group_offsets: NDArray[np.int64] = field(repr=False)

    def decode(self, sample: Mapping[Any, int] | ArrayLike) -> NDArray[np.int64]:
        """The choice ``(G,)`` of a sample: a mapping variable → 0/1, or the values in the order of the variables.

        Raises:
            EncodingError: a group has none or several options on, or the sample lacks variables.
        """
        size = int(self.group_offsets[-1])
        if isinstance(sample, Mapping):
            try:
                sample = [sample[v] for v in range(size)]
            except KeyError as error:
                raise EncodingError(f"the sample lacks variable {error} of the model") from error
        on = np.asarray(sample) > 0.5
        if on.shape != (size,):
            raise EncodingError(f"a sample has one value for each of {size} variables, found shape {on.shape}")
        counts = np.add.reduceat(on.astype(np.int64), self.group_offsets[:-1])
        if (counts != 1).any():
            group = int(np.argmax(counts != 1))
            raise EncodingError(f"the sample has {counts[group]} options on in group {group}, a choice has one")
        return np.asarray(np.flatnonzero(on) - self.group_offsets[:-1])


def to_cqm(problem: Problem) -> EncodedCqm:
    """``problem`` as a constrained quadratic model.

    Raises:
        EncodingError: a factor whose products would be more than `formulations.bqm.MAX_PAIRS`.

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_cqm(problem)
    >>> sorted(encoded.cqm.constraints), encoded.decode([1, 0, 0, 1]).tolist()
    (['budget bytes', 'group a', 'group b'], [0, 1])
    """
    import dimod

    couplings = pair_couplings(problem)
    objective = dimod.BinaryQuadraticModel.from_numpy_vectors(
        problem.cost, couplings, problem.offset, dimod.BINARY, variable_order=range(problem.num_options)
    )
    cqm = dimod.ConstrainedQuadraticModel.from_bqm(objective)
    for name, start, end in zip(problem.groups, problem.group_offsets[:-1], problem.group_offsets[1:], strict=True):
        if end - start > 1:
            cqm.add_discrete(range(start, end), label=f"group {name}", check_overlaps=False)
        else:
            cqm.add_constraint_from_iterable([(int(start), 1)], "==", rhs=1, label=f"group {name}")
    for name, budget in problem.budgets.items():
        use = problem.resources[name]
        terms = [(int(v), float(use[v])) for v in np.flatnonzero(use)]
        cqm.add_constraint_from_iterable(terms, "<=", rhs=budget, label=f"budget {name}")
    return EncodedCqm(cqm=cqm, group_offsets=problem.group_offsets)
