"""State a `Problem` as a 0/1 linear program (PuLP), with maps between its solutions and choices.

The program has one binary variable per option, one equation per group and one row per budget. The pair terms between
two groups are linearised by the first-level reformulation-linearisation (RLT; Adams & Sherali,
doi:10.1287/mnsc.32.10.1274). With ``y_uv = x_u·x_v`` for options u of one group and v of the other that have a term,

    Σ_v y_uv ≤ x_u      Σ_u y_uv ≤ x_v      Σ_u Σ_v y_uv ≥ Σ_u x_u + Σ_v x_v - 1

where a row whose sum runs over a whole group is an equation. For each pair of groups this is the convex hull of the
products, so the relaxation is as tight as a row-wise one can be. The ``y`` need not be integer.

The model's objective equals the problem's (including the offset). Each budget row, after subtracting fixed uses, is
divided by its largest coefficient, because solvers compare rows with absolute tolerances.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import EncodingError
from formulations.pairs import PairTerms
from formulations.problem import Problem, limit_of

MAX_PRODUCTS = 400_000
"""Maximum number of product variables ``y`` (about 10 µs each to build, and far more in the solver)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerProgram:
    """A PuLP model of a problem; unpacks as ``model, decode``.

    Attributes:
        model: the model, which minimises the problem's objective.
        x: V binary variables ``x_<group>_<option>``, in flat order.
        y: product variables with their two options: ``(variable, u, v)``.
        group_offsets: ``(G+1,)`` offsets of the problem's groups.
    """

    model: Any  # pulp.LpProblem
    x: tuple[Any, ...]
    y: tuple[tuple[Any, int, int], ...]
    group_offsets: NDArray[np.int64]

    def encode(self, choice: ArrayLike) -> dict[str, float]:
        """Convert a choice ``(G,)`` to a sample (variable name → value)."""
        chosen = np.zeros(len(self.x))
        chosen[self.group_offsets[:-1] + np.asarray(choice)] = 1.0
        sample = dict(zip((x.name for x in self.x), chosen.tolist(), strict=True))
        return sample | {y.name: float(chosen[u] * chosen[v]) for y, u, v in self.y}

    def start_from(self, choice: ArrayLike) -> None:
        """Set the model's variables to the values of a choice ``(G,)``, for solvers that support a warm start."""
        sample = self.encode(choice)
        for variable in (*self.x, *(y for y, _, _ in self.y)):
            variable.varValue = sample[variable.name]

    def decode(self, sample: Mapping[str, float] | None = None) -> NDArray[np.int64]:
        """Convert a sample (variable name → value) to a choice ``(G,)``; None takes the current values of the model.

        In each group the option with the largest value is taken. Budgets are not checked and may be exceeded within
        the solver's tolerance, so check the choice with ``Problem.evaluate``.

        Raises:
            EncodingError: a variable has no value.
        """
        values = [x.varValue if sample is None else sample.get(x.name) for x in self.x]
        if None in values:
            missing = self.x[values.index(None)].name
            raise EncodingError(f"no choice to decode: variable {missing!r} has no value (was the model solved?)")
        numbers = np.array(values, dtype=np.float64)
        groups = itertools.pairwise(self.group_offsets)
        return np.array([np.argmax(numbers[first:end]) for first, end in groups], dtype=np.int64)

    def __iter__(self) -> Iterator[Any]:
        """Unpack as ``model, decode = to_integer_program(problem)``."""
        yield self.model
        yield self.decode


def to_integer_program(problem: Problem) -> IntegerProgram:
    """State a problem as a mixed 0/1 linear program.

    Args:
        problem: any problem whose pair terms need at most `MAX_PRODUCTS` products of options.

    Returns:
        The model, with a ``decode`` method that reads a choice from it.

    Raises:
        EncodingError: the pair terms need too many products.

    >>> import pulp
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> model, decode = to_integer_program(problem)
    >>> _ = model.solve(pulp.HiGHS(msg=False))
    >>> decode().tolist(), pulp.value(model.objective)
    ([0, 1], 1.0)
    """
    import pulp  # local import, so that listing the available solvers does not load it

    problem = problem.without_fixed()
    model = pulp.LpProblem("qcompress", pulp.LpMinimize)
    first = problem.group_offsets
    x = tuple(
        model.add_variable(f"x_{group}_{option - first[group]}", 0, 1, "Integer")
        for option, group in enumerate(problem.group_of.tolist())
    )
    for group, (begin, end) in enumerate(itertools.pairwise(first.tolist())):
        terms = _sum([(variable, 1.0) for variable in x[begin:end]])
        model.addConstraint(pulp.LpConstraint(terms, pulp.LpConstraintEQ, f"one_{group}", 1.0))
    y, weights = _add_products(model, _with_all_products(problem), x)
    if problem.paired_budgets:
        weights = _objective_weights(problem, y)
    for k, (name, budget) in enumerate(problem.budgets.items()):
        use = problem.resources[name]
        together = [(variable, w) for variable, w in _uses_together(problem, name, y) if w]
        size = max([float(use.max()), *(w for _, w in together)]) or 1.0
        used = np.flatnonzero(use)
        terms = [(x[option], w) for option, w in zip(used.tolist(), (use[used] / size).tolist(), strict=True)]
        terms += [(variable, w / size) for variable, w in together]
        limit = limit_of(budget) / size
        model.addConstraint(pulp.LpConstraint(_sum(terms), pulp.LpConstraintLE, f"budget_{k}", limit))
    objective = [
        *zip(x, problem.cost.tolist(), strict=True),
        *((product[0], w) for product, w in zip(y, weights, strict=True)),
    ]
    model.setObjective(pulp.LpAffineExpression(objective, constant=problem.offset))
    return IntegerProgram(model=model, x=x, y=tuple(y), group_offsets=first)


def _with_all_products(problem: Problem) -> Problem:
    """Return the problem with a pair term for every product that its objective or a budget needs."""
    if not problem.paired_budgets:
        return problem
    pattern = sum((problem.resource_pairs[name] for name in problem.paired_budgets), start=_no_terms(problem))
    if problem.pairs.sparse is not None:
        pattern = pattern + abs(problem.pairs.sparse)
    pairs = PairTerms.trusted(sparse=scipy.sparse.csr_array(pattern), factor=problem.pairs.factor)
    return problem.derived(pairs=pairs)


def _no_terms(problem: Problem) -> Any:
    return scipy.sparse.csr_array((problem.num_options, problem.num_options))


def _objective_weights(problem: Problem, y: list[tuple[Any, int, int]]) -> list[float]:
    """Return the weight of every product in the objective."""
    u, v = (np.array([product[side] for product in y], dtype=np.int64) for side in (1, 2))
    sparse = _no_terms(problem) if problem.pairs.sparse is None else problem.pairs.sparse
    weights = np.asarray(sparse[u, v]).ravel() if len(u) else np.zeros(0)
    if problem.pairs.factor is not None:
        weights = weights + np.einsum("pr,pr->p", problem.pairs.factor[u], problem.pairs.factor[v])
    return [float(weight) for weight in weights]


def _uses_together(problem: Problem, name: str, y: list[tuple[Any, int, int]]) -> list[tuple[Any, float]]:
    """Return every product variable with its use of a resource."""
    if name not in problem.resource_pairs or not y:
        return []
    u, v = (np.array([product[side] for product in y], dtype=np.int64) for side in (1, 2))
    uses = np.asarray(problem.resource_pairs[name][u, v]).ravel()
    return [(product[0], float(use)) for product, use in zip(y, uses, strict=True)]


def num_products(problem: Problem) -> int:
    """Count the product variables that the pair terms need.

    >>> from formulations import PairTerms
    >>> num_products(Problem(["a", "b"], [["x", "y"]] * 2, [0, 0, 0, 0], {}, {}, PairTerms(factor=[[1.0]] * 4)))
    4
    """
    if problem.pairs.factor is not None and problem.pairs.factor.any():
        sizes = np.diff(problem.group_offsets)
        return int(sizes.sum() ** 2 - np.square(sizes).sum()) // 2
    if not problem.pairs.num_sparse:
        return 0
    rows, columns = problem.pairs.sparse.tocoo().coords
    block = problem.group_of[rows].astype(np.int64) * problem.num_groups + problem.group_of[columns]
    name, block = np.unique(block, return_inverse=True)
    sides = []
    for option in (rows, columns):
        met = np.unique(block * problem.num_options + option)
        sides.append(np.bincount(met // problem.num_options, minlength=len(name)))
    return int(sides[0] @ sides[1])


def _pair_entries(problem: Problem) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return all pair terms as (row option, column option, value), ordered by pairs of groups."""
    count = num_products(problem)
    if count > MAX_PRODUCTS:
        raise EncodingError(
            f"linearising the pair terms takes {count:,} product variables, the limit is {MAX_PRODUCTS:,}; "
            "solve with 'auto', 'lagrangian' or 'anneal', which do not linearise pair terms"
        )
    parts = []
    factor = problem.pairs.factor
    if factor is not None and factor.any():
        product = np.triu(factor @ factor.T)
        product[problem.group_of[:, None] == problem.group_of] = 0.0
        parts.append(scipy.sparse.csr_array(product))
    if problem.pairs.num_sparse:
        parts.append(problem.pairs.sparse)
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    matrix = sum(parts[1:], start=parts[0]).tocoo()
    rows, columns = matrix.coords
    order = np.lexsort((problem.group_of[columns], problem.group_of[rows]))
    return rows[order].astype(np.int64), columns[order].astype(np.int64), matrix.data[order]


def pair_blocks(problem: Problem) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Yield, for each pair of groups, the options of either group that have a pair term, and the matrix of terms.

    Raises:
        EncodingError: the pair terms need too many products.

    >>> from formulations import PairTerms
    >>> problem = Problem(["a", "b"], [["x", "y"]] * 2, [0] * 4, {}, {}, PairTerms(factor=[[0.0], [1.0], [2.0], [3.0]]))
    >>> [(above.tolist(), beside.tolist(), terms.tolist()) for above, beside, terms in pair_blocks(problem)]
    [([1], [2, 3], [[2.0, 3.0]])]
    """
    rows, columns, values = _pair_entries(problem)
    key = problem.group_of[rows] * problem.num_groups + problem.group_of[columns]
    limits = [*np.flatnonzero(np.diff(key, prepend=-1)).tolist(), len(key)]
    for begin, end in itertools.pairwise(limits):
        above, row = np.unique(rows[begin:end], return_inverse=True)
        beside, column = np.unique(columns[begin:end], return_inverse=True)
        weight = np.zeros((len(above), len(beside)))
        weight[row, column] = values[begin:end]
        yield above, beside, weight


def _add_products(
    model: Any,
    problem: Problem,
    x: tuple[Any, ...],
) -> tuple[list[tuple[Any, int, int]], list[float]]:
    """Add the product variables and their rows, block by block; return the variables and their objective weights."""
    import pulp

    products: list[tuple[Any, int, int]] = []
    weights: list[float] = []
    sizes = np.diff(problem.group_offsets)
    for above, beside, weight in pair_blocks(problem):
        y = [[model.add_variable(f"y_{u}_{v}", 0, 1) for v in beside] for u in above]
        flat = [variable for line in y for variable in line]
        products += [(y[i][j], int(u), int(v)) for i, u in enumerate(above) for j, v in enumerate(beside)]
        weights += weight.ravel().tolist()

        g, h = problem.group_of[above[0]], problem.group_of[beside[0]]
        all_above, all_beside = len(above) == sizes[g], len(beside) == sizes[h]
        lines: list[tuple[Any, Any, bool]] = [(u, line, all_beside) for u, line in zip(above, y, strict=True)]
        lines += [(v, line, all_above) for v, line in zip(beside, zip(*y, strict=True), strict=True)]
        for option, line, complete in lines:
            terms = _sum([(variable, 1.0) for variable in line] + [(x[option], -1.0)])
            sense = pulp.LpConstraintEQ if complete else pulp.LpConstraintLE
            model.addConstraint(pulp.LpConstraint(terms, sense, f"product_{g}_{h}_{option}", 0.0))
        if not (all_above or all_beside):
            terms = _sum([(variable, 1.0) for variable in flat] + [(x[option], -1.0) for option in (*above, *beside)])
            model.addConstraint(pulp.LpConstraint(terms, pulp.LpConstraintGE, f"product_{g}_{h}", -1.0))
    return products, weights


def _sum(terms: list[tuple[Any, float]]) -> Any:
    import pulp

    return pulp.LpAffineExpression(terms)
