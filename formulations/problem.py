"""The problem that every formulation builds and every solver takes: a quadratic multiple-choice knapsack.

    minimise   offset + Σ cost[v]·x_v + Σ_{u<v, different groups} Q[u,v]·x_u·x_v          Q = S + F·Fᵀ
    subject to Σ_{v in group g} x_v = 1   for every group g
               fixed_k + Σ_v use_k[v]·x_v + Σ_{u<v, different groups} P_k[u,v]·x_u·x_v ≤ budget_k
                                for every budgeted resource k

There are V options in G groups, numbered consecutively, group after group ("flat" indices). Invariants of a `Problem`:
every group has at least one option, all numbers are finite, resources and their pair terms are not negative, no sparse
pair term lies inside a group, and arrays are read-only. `Problem.evaluate` defines objective and feasibility.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InfeasibleBudgetError, InvalidProblemError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.formatting import amount, limit, markdown_table
from formulations.pairs import PairTerms
from formulations.products import sum_of_products
from formulations.resource_pairs import arrays_of, checked_resource_pairs, least_of_blocks, matrix_from
from formulations.validation import (
    checked_budgets,
    checked_fixed,
    checked_names,
    checked_number,
    checked_pairs,
    checked_uses,
    checked_vector,
    frozen,
    require_distinct,
)

FILE_KIND = FileKind("qcompress problem", version=3)

Budget = TypeVar("Budget", float, NDArray[np.float64])

BUDGET_TOLERANCE = 1e-12
"""Relative slack of a budget, for rounding errors in sums of floats (at most one byte in a terabyte)."""


def limit_of(budget: Budget) -> Budget:
    """Return the largest use that `Problem.evaluate` accepts for a budget, or for each of an array of budgets."""
    return budget + BUDGET_TOLERANCE * abs(budget)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Value of a choice: objective, use of every resource, and excess over every violated budget."""

    objective: float
    usage: dict[str, float]
    violations: dict[str, float]

    @property
    def feasible(self) -> bool:
        """Whether every budget holds."""
        return not self.violations


@dataclass(frozen=True, slots=True, eq=False, init=False, repr=False)
class Problem:
    """A quadratic multiple-choice knapsack (see the module's docstring).

    Args:
        groups: G distinct names.
        options: for each group, the distinct names of its options.
        cost: ``(V,)`` objective of each option alone.
        resources: name → ``(V,)`` use by each option, not negative.
        budgets: name of a resource → upper limit on its total use.
        pairs: pair costs between options of different groups, or None.
        offset: constant part of the objective.
        fixed: name of a resource → amount used whatever is chosen; 0 for resources not listed.
        resource_pairs: name of a resource → ``(V, V)`` scipy sparse matrix, strictly upper triangular and not negative:
            the amount that two options of different groups use together (for example, the bytes of a layer are its
            input channels times its output channels).

    Raises:
        InvalidProblemError: an argument is invalid; the message says what was found and what would work.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> problem.evaluate([0, 1])
    Evaluation(objective=1.0, usage={'bytes': 12.0}, violations={})
    >>> problem.evaluate([0, 0]).violations
    {'bytes': 4.0}
    """

    groups: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]
    cost: NDArray[np.float64]
    resources: Mapping[str, NDArray[np.float64]]
    budgets: Mapping[str, float]
    pairs: PairTerms
    offset: float
    fixed: Mapping[str, float]
    resource_pairs: Mapping[str, Any]
    group_offsets: NDArray[np.int64]
    group_of: NDArray[np.int64]

    def __init__(
        self,
        groups: Sequence[str],
        options: Sequence[Sequence[str]],
        cost: ArrayLike,
        resources: Mapping[str, ArrayLike],
        budgets: Mapping[str, float],
        pairs: PairTerms | None = None,
        offset: float = 0.0,
        fixed: Mapping[str, float] = MappingProxyType({}),
        resource_pairs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        names = checked_names(groups, "groups")
        labels = tuple(
            checked_names(group, f"options of group {name!r}") for name, group in zip(names, options, strict=False)
        )
        require_distinct(names, labels, len(options))
        sizes = np.array([len(group) for group in labels], dtype=np.int64)
        group_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        group_of = np.repeat(np.arange(len(names)), sizes)
        uses = checked_uses(resources, names, labels, group_offsets)
        values = {
            "groups": names,
            "options": labels,
            "cost": checked_vector(cost, len(group_of), "cost"),
            "resources": MappingProxyType(uses),
            "budgets": MappingProxyType(checked_budgets(budgets, uses)),
            "pairs": checked_pairs(pairs, group_of),
            "offset": checked_number(offset, "offset"),
            "fixed": MappingProxyType(checked_fixed(fixed, uses)),
            "resource_pairs": MappingProxyType(checked_resource_pairs(resource_pairs, uses, group_of)),
            "group_offsets": frozen(group_offsets),
            "group_of": frozen(group_of),
        }
        for field, value in values.items():
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        budgets = ", ".join(f"{name} <= {budget:,.6g}" for name, budget in self.budgets.items()) or "no budget"
        pairs = (
            f"factor rank {self.pairs.rank}, {self.pairs.num_sparse} sparse pair terms" if self.pairs else "no pairs"
        )
        uses = "".join(f", {terms.nnz} pair terms in {name}" for name, terms in self.resource_pairs.items())
        return f"<Problem: {self.num_groups} groups, {self.num_options} options, {budgets}, {pairs}{uses}>"

    def _repr_markdown_(self) -> str:
        limits = {name: amount(budget) for name, budget in self.budgets.items()}
        rows = [(name, amount(least), limits.get(name, "–")) for name, least in self.minimum_usage().items()]
        return repr(self).strip("<>") + "\n\n" + markdown_table(("resource", ">smallest use", ">budget"), rows)

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return len(self.groups)

    @property
    def num_options(self) -> int:
        """Total number of options V, over all groups."""
        return int(self.group_offsets[-1])

    def flat(self, choice: ArrayLike) -> NDArray[np.int64]:
        """Convert local option indices ``(..., G)`` of a choice to flat indices of the same shape.

        Raises:
            InvalidProblemError: the shape is wrong, a value is not a whole number, or a group has no such option.
        """
        array = np.asarray(choice)
        if array.shape[-1:] != (self.num_groups,):
            raise InvalidProblemError(
                f"a choice has one option index per group: expected {self.num_groups}, found shape {array.shape}"
            )
        if array.dtype.kind not in "iu" and (array.dtype.kind != "f" or not (array == np.floor(array)).all()):
            raise InvalidProblemError(f"a choice holds whole numbers, found {array.dtype} values")
        wrong = (array < 0) | (array >= np.diff(self.group_offsets))
        if wrong.any():
            group = int(np.argwhere(wrong)[0][-1])
            raise InvalidProblemError(
                f"group {self.groups[group]!r} has options 0..{len(self.options[group]) - 1}, "
                f"the choice asks for {array[..., group].ravel()[np.argmax(wrong[..., group].ravel())]}"
            )
        return self.group_offsets[:-1] + array.astype(np.int64)

    def evaluate(self, choice: ArrayLike) -> Evaluation:
        """Compute objective, usage and violated budgets of one choice ``(G,)`` of local option indices.

        The time is O(V + G·r + nnz).

        Raises:
            InvalidProblemError: the choice is not one option index per group.
        """
        chosen = self.flat(choice)
        if chosen.ndim != 1:
            raise InvalidProblemError(f"evaluate takes one choice of shape ({self.num_groups},), found {chosen.shape}")
        usage = self.usage(chosen)
        violations = {
            name: usage[name] - budget for name, budget in self.budgets.items() if usage[name] > limit_of(budget)
        }
        objective = self.offset + (float(self.cost[chosen].sum()) + self._pair_value(chosen))
        return Evaluation(objective=objective, usage=usage, violations=violations)

    def usage(self, chosen: NDArray[np.int64]) -> dict[str, float]:
        """Return the use of every resource by the flat options ``(G,)``, including fixed uses."""
        usage = {name: self.fixed.get(name, 0.0) + float(use[chosen].sum()) for name, use in self.resources.items()}
        for name, terms in self.resource_pairs.items():
            x = np.zeros(self.num_options)
            x[chosen] = 1.0
            usage[name] += float(x @ (terms @ x))
        return usage

    def _pair_value(self, chosen: NDArray[np.int64]) -> float:
        value = 0.0
        if self.pairs.factor is not None:
            value += sum_of_products(self.pairs.factor[chosen])
        if self.pairs.num_sparse:
            x = np.zeros(self.num_options)
            x[chosen] = 1.0
            value += float(x @ (self.pairs.sparse @ x))
        return value

    def with_budgets(self, **budgets: float) -> "Problem":
        """Return the same problem with some budgets replaced; the others stay.

        Raises:
            InvalidProblemError: a budget names an unknown resource or is not a finite number.
        """
        merged = MappingProxyType(checked_budgets({**self.budgets, **budgets}, self.resources))
        return self.derived(budgets=merged)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments (for worker processes only; files never hold pickles)."""
        resources, budgets, fixed = dict(self.resources), dict(self.budgets), dict(self.fixed)
        stated = (self.groups, self.options, self.cost, resources, budgets, self.pairs, self.offset, fixed)
        return Problem, (*stated, dict(self.resource_pairs))

    def derived(self, **fields: Any) -> "Problem":
        """Return a copy with some fields replaced, unchecked; for reductions, which preserve the invariants."""
        copy = object.__new__(Problem)
        for field in self.__slots__:
            object.__setattr__(copy, field, fields.get(field, getattr(self, field)))
        return copy

    def minimum_usage(self) -> dict[str, float]:
        """Return the smallest use of every resource that any choice can have, each resource taken alone.

        For a resource with pair terms this is only a lower bound: each pair of groups counts its smallest term.

        >>> Problem(["a"], [["keep", "prune"]], [0, 1], {"bytes": [8, 4]}, {}).minimum_usage()
        {'bytes': 4.0}
        """
        starts = self.group_offsets[:-1]
        smallest = {
            name: self.fixed.get(name, 0.0) + float(np.minimum.reduceat(use, starts).sum())
            for name, use in self.resources.items()
        }
        for name, terms in self.resource_pairs.items():
            smallest[name] += least_of_blocks(terms, self.group_of, np.diff(self.group_offsets))
        return smallest

    @property
    def paired_budgets(self) -> tuple[str, ...]:
        """Names of the budgets whose resource has pair terms."""
        return tuple(name for name in self.budgets if name in self.resource_pairs)

    def require_linear_budgets(self, what: str) -> None:
        """Refuse budgets whose resource has pair terms, for a method ``what`` that does not support them.

        Raises:
            InvalidProblemError: there are such budgets; the message names ``what`` and the budgets.
        """
        if self.paired_budgets:
            raise InvalidProblemError(
                f"{what} takes no pair terms in a budget, this problem has some in {', '.join(self.paired_budgets)}; "
                "solve(), to_cqm and to_integer_program support them"
            )

    def without_fixed(self) -> "Problem":
        """Return the same problem without fixed uses, which are subtracted from the budgets.

        Exactly the same choices are feasible. Without fixed uses the problem itself is returned.

        >>> problem = Problem(["a"], [["keep", "prune"]], [0, 1], {"bytes": [8, 4]}, {"bytes": 10}, fixed={"bytes": 5})
        >>> round(problem.without_fixed().budgets["bytes"], 9)
        5.0
        """
        if not self.fixed:
            return self
        rest = {name: limit_of(budget) - self.fixed.get(name, 0.0) for name, budget in self.budgets.items()}
        budgets = {
            name: room - BUDGET_TOLERANCE * abs(room) if name in self.fixed else self.budgets[name]
            for name, room in rest.items()
        }
        return self.derived(budgets=MappingProxyType(budgets), fixed=MappingProxyType({}))

    def require_reachable_budgets(self) -> None:
        """Refuse budgets that no choice can meet, each budget taken alone.

        Raises:
            InfeasibleBudgetError: a budget cannot be met; the message names each such resource, its budget and the
                smallest possible use.
        """
        smallest = self.minimum_usage()
        broken = [
            f"{name}: asked for at most {limit(budget)}, the smallest possible use is {limit(smallest[name])}"
            for name, budget in self.budgets.items()
            if smallest[name] > limit_of(budget)
        ]
        if broken:
            error = InfeasibleBudgetError("no choice meets the budget for " + "; ".join(broken))
            error.problem = self  # for `explain_infeasibility`
            raise error

    def fingerprint(self) -> str:
        """Return a SHA-256 of the problem's content, equal for equal problems on every machine."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(name.encode() + array.dtype.str.encode() + repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def save(self, path: AnyPath) -> None:
        """Write the problem to one ``.npz`` file, atomically; `load` restores it exactly."""
        FILE_KIND.write_arrays(path, self._header(), self._arrays())

    @classmethod
    def load(cls, path: AnyPath) -> "Problem":
        """Read a problem that `save` wrote.

        Raises:
            FileFormatError: the file is truncated, of another kind or version, or contains a pickle.
            InvalidProblemError: the content of the file does not make a valid problem.
        """
        header, arrays = FILE_KIND.read_arrays(path)
        try:
            sparse = None
            if "sparse_data" in arrays:
                size = len(arrays["cost"])
                parts = (arrays["sparse_data"], arrays["sparse_indices"], arrays["sparse_indptr"])
                sparse = scipy.sparse.csr_array(parts, shape=(size, size))
            return cls(
                header["groups"],
                header["options"],
                arrays["cost"],
                {name: arrays[f"resource_{i}"] for i, name in enumerate(header["resources"])},
                header["budgets"],
                PairTerms(sparse=sparse, factor=arrays.get("factor")),
                header["offset"],
                header.get("fixed", {}),
                {
                    name: matrix_from(arrays, f"resource_pairs_{i}", len(arrays["cost"]))
                    for i, name in enumerate(header.get("resource_pairs", ()))
                },
            )
        except KeyError as error:
            raise InvalidProblemError(f"{path} lacks the entry {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # the header's JSON may hold any type
            raise InvalidProblemError(f"{path} does not hold a problem: {error}") from error

    def _header(self) -> dict[str, Any]:
        header = {
            "groups": self.groups,
            "options": self.options,
            "resources": list(self.resources),
            "budgets": dict(self.budgets),
            "offset": self.offset,
        }
        # what is empty is left out, as in the fingerprints that are recorded for stored instances
        header |= {"fixed": dict(self.fixed)} if self.fixed else {}
        header |= {"resource_pairs": list(self.resource_pairs)} if self.resource_pairs else {}
        return header

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {"cost": self.cost}
        arrays |= {f"resource_{i}": use for i, use in enumerate(self.resources.values())}
        if self.pairs.factor is not None:
            arrays["factor"] = self.pairs.factor
        if self.pairs.sparse is not None:
            sparse = self.pairs.sparse
            arrays |= {"sparse_data": sparse.data}
            arrays |= {
                "sparse_indices": sparse.indices.astype(np.int64),
                "sparse_indptr": sparse.indptr.astype(np.int64),
            }
        for i, terms in enumerate(self.resource_pairs.values()):
            arrays |= arrays_of(terms, f"resource_pairs_{i}")
        return arrays
