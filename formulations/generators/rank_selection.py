"""Rank selection as a quadratic multiple-choice knapsack: one rank per layer, or the dense layer, within budgets.

A weight ``(m, n)`` at rank r takes ``r·(m + n)`` numbers and leaves the tail energy ``Σ_{i>r} σ_i²`` out
(Eckart-Young). The options of a layer are its ranks in ascending order and "dense" at the end, so that they are
ordered by use, as the domain-wall and binary encodings like them. The cost is an error of a layer alone (tail energy,
an error in whitened coordinates, a measured loss), and a factor adds what layers do together; every solver and form
takes the result.

Two kinds of objective: the sum of the errors, or the largest one (ALDS, arXiv 2107.11442), which is a question of
what to allow: the smallest threshold is found at which the budgets can be met, dearer options go, and the sum decides
among what is left.
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
from formulations.problem import BUDGET_TOLERANCE, Problem
from formulations.reductions.restriction import part
from formulations.reductions.tie import tie

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankTable:
    """The options of one layer, ascending in rank, the dense layer last.

    Attributes:
        labels: name of each option.
        ranks: rank of each option; the dense layer's is its full rank.
        error: ``(n,)`` what each option costs alone; 0 for the dense layer.
        resources: name → ``(n,)`` use of each option.
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
    """The options of a layer from the singular values of its weight.

    Args:
        singular_values: ``(min(m, n),)``, descending; those of the whitened weight give the whitened error.
        shape: ``(m, n)`` of the weight as a matrix.
        ranks: on offer; None: all. Ranks that save nothing (``r·(m + n) ≥ m·n``) are left out.
        positions: how often the layer is applied per sample; macs are so many times its numbers.
        relative: errors as shares of the weight's energy.

    Returns:
        A table with the resources ``parameters`` and ``macs``.

    Raises:
        InvalidProblemError: singular values that are not descending or not as many as the shape has; a rank that no
            such matrix has.

    >>> table = rank_table([2.0, 1.0, 0.0, 0.0], (4, 4))
    >>> table.labels, table.error.tolist(), table.resources["parameters"].tolist()
    (('rank 1', 'dense'), [0.2, 0.0], [8.0, 16.0])
    """
    values = np.asarray(singular_values, dtype=np.float64)
    m, n = shape
    if values.shape != (min(m, n),) or not np.isfinite(values).all():
        raise InvalidProblemError(f"a {m}×{n} matrix has {min(m, n)} singular values, found shape {values.shape}")
    if (values < 0).any() or (np.diff(values) > 1e-12 * (1.0 + values[0])).any():
        raise InvalidProblemError("singular values are ≥ 0 and in descending order")
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
    """The problem of choosing a rank for every layer.

    Args:
        layers: names.
        tables: one for each layer.
        budgets: resource of the tables → the most that the whole model may use.
        factor: ``(V, r)``; chosen options u, v of different layers add ``factor[u]·factor[v]``.
        fixed: resource → its use by what is not chosen about.
        tied: sets of layers that must take the same option; each becomes one group, named ``"a + b"``.
        largest: minimise the largest error, and the sum only among the choices whose largest error is least.

    Raises:
        InvalidProblemError: the tables do not fit together.
        InfeasibleBudgetError: with ``largest``, no choice meets the budgets.

    >>> tables = [rank_table([3.0, 1.0, 0.5, 0.1], (4, 4)), rank_table([1.0, 1.0, 1.0, 1.0], (4, 4))]
    >>> problem = rank_selection(["steep", "flat"], tables, {"parameters": 24})
    >>> problem.options[0], problem.evaluate([0, 1]).feasible
    (('rank 1', 'dense'), True)
    """
    if len(tables) != len(layers):
        raise InvalidProblemError(f"one table for each layer: {len(layers)} layers, {len(tables)} tables")
    names = list(tables[0].resources) if tables else []
    if odd := [layer for layer, table in zip(layers, tables, strict=True) if list(table.resources) != names]:
        raise InvalidProblemError(
            f"all tables have the same resources: {layers[0]!r} has {names}, {odd[0]!r} has others"
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
    """The least t so that options with an error of at most t can meet all budgets.

    Args:
        problem: its cost and pair terms play no part.
        error: ``(V,)`` of every option.

    Raises:
        InvalidProblemError: not one error for each option.
        InfeasibleBudgetError: no choice meets the budgets, whatever is allowed.

    >>> problem = Problem(["a", "b"], [["small", "big"]] * 2, [3, 0, 1, 0], {"bytes": [1, 4, 1, 4]}, {"bytes": 5})
    >>> smallest_threshold(problem, problem.cost)
    1.0
    """
    errors = np.asarray(error, dtype=np.float64)
    if errors.shape != (problem.num_options,):
        raise InvalidProblemError(f"one error for each of {problem.num_options} options, found shape {errors.shape}")
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
    """The problem with only the options whose error is at most ``threshold``; all groups stay.

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
    """Whether some choice of the options that are kept meets all budgets."""
    problem = problem.without_fixed()
    limits = {name: budget + BUDGET_TOLERANCE * abs(budget) for name, budget in problem.budgets.items()}
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
        scale = limit or 1.0  # rows near 1: the solver compares with an absolute tolerance
        rows.append(scipy.optimize.LinearConstraint(problem.resources[name][kept][None] / scale, ub=limit / scale))
    answer: Any = scipy.optimize.milp(
        np.zeros(len(kept)), integrality=np.ones(len(kept)), bounds=scipy.optimize.Bounds(0, 1), constraints=rows
    )
    return bool(answer.status == 0)
