"""State a `Problem` as a constrained quadratic model: discrete constraints for groups, linear ones for budgets.

There are no penalties: objective and constraints are those of the problem, so a choice has the same objective and the
same violations in both. Variable v of the model is flat option v.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.forms.couplings import MAX_PAIRS
from formulations.forms.cqm_file import constraints, cqm_file, num_pairs
from formulations.problem import Problem

if TYPE_CHECKING:
    import dimod  # at run time only the functions that build a model import it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedCqm:
    """A constrained quadratic model, with maps between its samples and choices."""

    cqm: "dimod.ConstrainedQuadraticModel"
    group_offsets: NDArray[np.int64] = field(repr=False)

    def encode(self, choice: ArrayLike) -> dict[int, int]:
        """Convert a choice ``(G,)`` to a sample (variable → 0 or 1)."""
        on = np.zeros(int(self.group_offsets[-1]), dtype=np.int64)
        on[self.group_offsets[:-1] + np.asarray(choice)] = 1
        return dict(enumerate(on.tolist()))

    def decode(self, sample: Mapping[Any, int] | ArrayLike) -> NDArray[np.int64]:
        """Convert a sample to a choice ``(G,)``; it is a mapping variable → 0/1, or the values in variable order.

        Raises:
            EncodingError: a group has no option or several options on, or the sample lacks variables.
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
    """State a problem as a constrained quadratic model.

    Raises:
        EncodingError: there are more pairs than `formulations.forms.couplings.MAX_PAIRS` (`cqm_file` can write more).

    >>> from formulations import Problem
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> encoded = to_cqm(problem)
    >>> sorted(encoded.cqm.constraints), encoded.decode([1, 0, 0, 1]).tolist()
    (['budget bytes', 'group a', 'group b'], [0, 1])
    """
    import dimod

    if (count := num_pairs(problem)) > MAX_PAIRS:
        raise EncodingError(
            f"the model would couple {count:,} pairs of options, more than {MAX_PAIRS:,}; keep them sparse, or "
            "use a form that keeps the factor (to_nonlinear, solver 'leap-nl') or a solver that does ('auto', 'anneal')"
        )
    with cqm_file(problem, rows=()) as file:  # six times as fast as passing the pairs to dimod
        cqm = dimod.ConstrainedQuadraticModel.from_file(file)
    for row in constraints(problem):
        terms: list[tuple[Any, ...]] = [*zip(row.variables.tolist(), row.weights.tolist(), strict=True)]
        terms += [(row.constant,)] if row.constant else []
        if (name := row.label.removeprefix("budget ")) in problem.resource_pairs and name != row.label:
            entries = problem.resource_pairs[name].tocoo()
            terms += zip(*(column.tolist() for column in (*entries.coords, entries.data)), strict=True)
        cqm.add_constraint_from_iterable(terms, row.sense, rhs=row.rhs, label=row.label)
        cqm.constraints[row.label].lhs.mark_discrete(row.discrete)
    return EncodedCqm(cqm=cqm, group_offsets=problem.group_offsets)
