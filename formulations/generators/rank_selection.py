"""Rank selection as a quadratic multiple-choice knapsack: one rank per layer, or the dense layer, within budgets.

A weight ``(m, n)`` at rank r takes ``r·(m + n)`` numbers and loses the tail energy ``Σ_{i>r} σ_i²`` (Eckart-Young). The
options of a layer are its ranks in ascending order followed by "dense", so that they are ordered by use, which suits
the domain-wall and binary encodings. The cost of an option is the error of its layer alone (tail energy, an error in
whitened coordinates, or a measured loss). A factor adds the interactions between layers. Every solver and form accepts
the result.

The objective is either the sum of the errors or the largest error (ALDS, arXiv 2107.11442). For the largest error, the
smallest threshold is found at which the budgets can be met, options with larger errors are removed, and the sum is
minimised over the remaining options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from formulations.errors import InfeasibleBudgetError, InvalidProblemError
from formulations.generators.prune_quantize import prune_quantize
from formulations.problem import Problem, limit_of
from formulations.reductions.restriction import part
from formulations.reductions.tie import tie

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankTable:
    """The options of one layer, ascending in rank, with the dense layer last.

    Attributes:
        labels: name of each option.
        ranks: rank of each option; the full rank for the dense layer.
        error: ``(n,)`` error of each option alone; 0 for the dense layer.
        resources: name of a resource → ``(n,)`` use by each option.
    """

    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    error: NDArray[np.float64]
    resources: Mapping[str, NDArray[np.float64]]


def rank_table(
    singular_values: ArrayLike,
    shape: tuple[int, int],
    *,
    ranks: Sequence[int] | None = None,
    positions: float = 1.0,
    relative: bool = True,
) -> RankTable:
    """Build the options of a layer from the singular values of its weight.

    Args:
        singular_values: ``(min(m, n),)`` singular values, descending; those of the whitened weight give the whitened
            error.
        shape: shape ``(m, n)`` of the weight as a matrix.
        ranks: available ranks; None for all. Ranks that save nothing (``r·(m + n) ≥ m·n``) are left out.
        positions: number of times the layer is applied per sample; macs are its parameters times this.
        relative: whether errors are fractions of the weight's energy.

    Returns:
        A table with the resources ``parameters`` and ``macs``.

    Raises:
        InvalidProblemError: the singular values are not descending or do not match the shape, or a rank is impossible
            for the shape.

    >>> table = rank_table([2.0, 1.0, 0.0, 0.0], (4, 4))
    >>> table.labels, table.error.tolist(), table.resources["parameters"].tolist()
    (('rank 1', 'dense'), [0.2, 0.0], [8.0, 16.0])
    """
    values = np.asarray(singular_values, dtype=np.float64)
    m, n = shape
    if values.shape != (min(m, n),) or not np.isfinite(values).all():
        raise InvalidProblemError(f"a {m}×{n} matrix has {min(m, n)} singular values, found shape {values.shape}")
    if (values < 0).any() or (np.diff(values) > 1e-12 * (1.0 + values[0])).any():
        raise InvalidProblemError("singular values must be ≥ 0 and in descending order")
    wanted = range(1, len(values)) if ranks is None else sorted(set(ranks))
    if wrong := [rank for rank in wanted if not 0 < rank <= len(values)]:
        raise InvalidProblemError(f"a {m}×{n} matrix has ranks 1 to {len(values)}, asked for {wrong[0]}")
    saving = [rank for rank in wanted if rank * (m + n) < m * n]
    tail = np.append(np.cumsum(values[::-1] ** 2)[::-1], 0.0)
    numbers = np.array([*(rank * (m + n) for rank in saving), m * n], dtype=np.float64)
    error = np.array([*tail[saving], 0.0])
    return RankTable(
        labels=(*(f"rank {rank}" for rank in saving), DENSE),
        ranks=(*saving, len(values)),
        error=error / (tail[0] or 1.0) if relative else error,
        resources={"parameters": numbers, "macs": numbers * positions},
    )


def rank_selection(
    layers: Sequence[str],
    tables: Sequence[RankTable],
    budgets: Mapping[str, float],
    *,
    factor: ArrayLike | None = None,
    fixed: Mapping[str, float] | None = None,
    tied: Sequence[Sequence[str]] = (),
    largest: bool = False,
) -> Problem:
    """Build the problem of choosing a rank for every layer.

    Args:
        layers: names of the layers.
        tables: one table of options for each layer.
        budgets: resource of the tables → upper limit on the use by the whole model.
        factor: ``(V, r)``; chosen options u, v of different layers add ``factor[u]·factor[v]``.
        fixed: resource → use by everything that is not up for choice.
        tied: sets of layers that must take the same option; each becomes one group, named ``"a + b"``.
        largest: whether to minimise the largest error first, and the sum of errors only among those choices.

    Raises:
        InvalidProblemError: the tables are inconsistent.
        InfeasibleBudgetError: ``largest`` is set and no choice meets the budgets.

    >>> tables = [rank_table([3.0, 1.0, 0.5, 0.1], (4, 4)), rank_table([1.0, 1.0, 1.0, 1.0], (4, 4))]
    >>> problem = rank_selection(["steep", "flat"], tables, {"parameters": 24})
    >>> problem.options[0], problem.evaluate([0, 1]).feasible
    (('rank 1', 'dense'), True)
    """
    if len(tables) != len(layers):
        raise InvalidProblemError(f"give one table for each layer, found {len(layers)} layers, {len(tables)} tables")
    names = list(tables[0].resources) if tables else []
    if odd := [layer for layer, table in zip(layers, tables, strict=True) if list(table.resources) != names]:
        raise InvalidProblemError(
            f"all tables must have the same resources: {layers[0]!r} has {names}, {odd[0]!r} has others"
        )
    cost = np.concatenate([table.error for table in tables]) if tables else np.zeros(0)
    resources = {name: np.concatenate([table.resources[name] for table in tables]) for name in names}
    problem = prune_quantize(
        layers, [table.labels for table in tables], cost, resources, budgets, factor=factor, fixed=fixed
    )
    error = cost
    if tied:
        joined = tie(problem, tied)
        problem, error = joined.problem, joined.combined(error, np.maximum)
    return allow_up_to(problem, error, smallest_threshold(problem, error)) if largest else problem


def smallest_threshold(problem: Problem, error: ArrayLike) -> float:
    """Find the smallest t at which the options with an error of at most t can meet all budgets.

    Args:
        problem: any problem; its costs and pair terms are ignored.
        error: ``(V,)`` error of every option.

    Raises:
        InvalidProblemError: ``error`` does not have one entry per option.
        InfeasibleBudgetError: no choice meets the budgets, whatever error is allowed.

    >>> problem = Problem(["a", "b"], [["small", "big"]] * 2, [3, 0, 1, 0], {"bytes": [1, 4, 1, 4]}, {"bytes": 5})
    >>> smallest_threshold(problem, problem.cost)
    1.0
    """
    errors = np.asarray(error, dtype=np.float64)
    if errors.shape != (problem.num_options,):
        raise InvalidProblemError(f"give one error for each of {problem.num_options} options, found {errors.shape}")
    least = float(np.minimum.reduceat(errors, problem.group_offsets[:-1]).max())
    candidates = np.unique(errors[errors >= least])
    low, high = 0, len(candidates)  # the first candidate that can meet the budgets is in low..high
    while low < high:
        middle = (low + high) // 2
        if _reachable(problem, errors <= candidates[middle]):
            high = middle
        else:
            low = middle + 1
    if low == len(candidates):
        problem.require_reachable_budgets()
        raise InfeasibleBudgetError("no choice meets all budgets together, whatever error is allowed")
    return float(candidates[low])


def allow_up_to(problem: Problem, error: ArrayLike, threshold: float) -> Problem:
    """Restrict the problem to the options with an error of at most ``threshold``; all groups stay.

    Raises:
        InvalidProblemError: a group has no such option.
    """
    keep = np.asarray(error, dtype=np.float64) <= threshold
    num_kept = np.bincount(problem.group_of[keep], minlength=problem.num_groups)
    if (num_kept == 0).any():
        name = problem.groups[int(np.argmin(num_kept))]
        raise InvalidProblemError(f"group {name!r} has no option with an error of at most {threshold:g}")
    return part(problem, np.flatnonzero(keep), problem.budgets)


def _reachable(problem: Problem, keep: NDArray[np.bool_]) -> bool:
    """Whether some choice of kept options meets all budgets."""
    problem = problem.without_fixed()
    limits = {name: limit_of(budget) for name, budget in problem.budgets.items()}
    uses = {name: np.where(keep, problem.resources[name], np.inf) for name in limits}
    least = {name: np.minimum.reduceat(use, problem.group_offsets[:-1]).sum() for name, use in uses.items()}
    if any(least[name] > limit for name, limit in limits.items()):
        return False
    if len(limits) < 2:
        return True
    kept = np.flatnonzero(keep)
    membership = scipy.sparse.csr_array((np.ones(len(kept)), (problem.group_of[kept], np.arange(len(kept)))))
    rows = [scipy.optimize.LinearConstraint(membership, 1, 1)]
    for name, limit in limits.items():
        scale = limit or 1.0  # scale rows to about 1, because the solver's tolerance is absolute
        rows.append(scipy.optimize.LinearConstraint(problem.resources[name][kept][None] / scale, ub=limit / scale))
    answer: Any = scipy.optimize.milp(
        np.zeros(len(kept)), integrality=np.ones(len(kept)), bounds=scipy.optimize.Bounds(0, 1), constraints=rows
    )
    return bool(answer.status == 0)
