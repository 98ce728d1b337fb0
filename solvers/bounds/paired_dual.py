"""The dual of a problem whose budgets have pair terms, at varying prices.

At given prices the budgets' pair terms are part of the objective (`formulations.reductions.pricing`), and the dual
function of `solvers.bounds.dual` bounds the priced problem. From one price to the next only the weights of the blocks
change, so messages and multipliers of the factor start from their previous values, and a few sweeps are sufficient.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse

from formulations import PairTerms, Problem
from formulations.problem import limit_of
from solvers.bounds.dual import Dual, DualBound
from solvers.bounds.messages import pass_messages
from solvers.bounds.smoothed_dual import DualTerms, descend
from solvers.kernels.moves import Floats

SWEEPS = 6
"""Number of message-passing sweeps between two evaluations of the bound."""

ROUNDS = 8
"""Maximum number of evaluations of the bound for one price."""

SETTLED = 1e-4
"""The last round is the first that raises the bound by no more than this fraction."""

STEPS = 60
"""Number of L-BFGS iterations at each temperature, for problems with a factor."""

FIRST, LATER = 40, 6
"""Number of steps of the factor's multipliers at the first price, and at later prices."""

TEMPERATURES = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Temperatures of softmin, relative to the typical effect of one group; later prices start at the third."""


class PairedDual:
    """Bounds of a problem at given prices for its budgets with pair terms."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        terms = {name: problem.resource_pairs[name] for name in problem.paired_budgets}
        sparse = problem.pairs.sparse
        pattern = sum(terms.values(), start=scipy.sparse.csr_array((problem.num_options,) * 2))
        pattern = pattern if sparse is None else pattern + abs(sparse)
        unpaired = {name: budget for name, budget in problem.budgets.items() if name not in terms}
        self._dual = Dual(
            problem.derived(
                pairs=PairTerms.trusted(sparse=scipy.sparse.csr_array(pattern), factor=problem.pairs.factor),
                budgets=unpaired,
                resources={name: problem.resources[name] for name in unpaired},
                fixed={name: use for name, use in problem.fixed.items() if name in unpaired},
                resource_pairs={},
            )
        )
        self._cost, self._blocks = self._dual.cost, self._dual.blocks
        self._weights = np.zeros(len(self._blocks.weights)) if sparse is None else self._on_blocks(sparse)
        self._uses = {name: self._on_blocks(matrix) for name, matrix in terms.items()}
        self._point = np.zeros(self._dual.size)
        self._warm = False

    def bound(self, prices: Mapping[str, float], deadline: float) -> DualBound:
        """Bound the objective of every feasible choice at these prices; the bound's choice may be infeasible."""
        problem, dual = self.problem, self._dual
        weights, cost, constant = self._weights.copy(), self._cost.copy(), 0.0
        for name, price in prices.items():
            weights += price * self._uses[name]
            cost += price * problem.resources[name]
            budget = problem.budgets[name]
            constant += price * (problem.fixed.get(name, 0.0) - limit_of(budget))
        dual.cost, dual.blocks = cost, replace(self._blocks, weights=weights)
        if len(dual.limit):
            self._by_temperature(deadline)
        elif dual.factor.shape[1]:
            self._averaged(deadline)
        best = self._passed(deadline)
        return replace(best, value=best.value + constant)

    def _by_temperature(self, deadline: float) -> None:
        """Run L-BFGS from the result for the last prices."""
        dual = self._dual
        typical = dual.typical_effect() or 1.0
        terms = DualTerms(dual.first, dual.cost, dual.use, dual.limit, dual.factor, *dual.blocks.arrays)
        best, best_point = np.array([-np.inf]), self._point.copy()
        for temperature in TEMPERATURES[2 * self._warm :]:
            if time.perf_counter() > deadline:
                break
            point = best_point.copy()
            descend(terms, temperature * typical, point, best, best_point, STEPS, np.inf)
        self._point, self._warm = best_point, True

    def _averaged(self, deadline: float) -> None:
        """Update the factor's multipliers y along the ascent direction ``Fᵀx - y`` of the dual's choice x.

        With falling step sizes, y is an average of ``Fᵀx`` over many choices, as in the conditional gradient method;
        later prices change it less.
        """
        dual, blocks, first = self._dual, self._dual.blocks, self.problem.group_offsets[:-1]
        best, best_point = -np.inf, self._point
        for step in range(LATER if self._warm else FIRST):
            _, direction, messages = dual.split(self._point)
            cost = dual.cost + dual.factor @ direction
            pass_messages(dual.first, cost, blocks.row, blocks.weights, *blocks.incident, messages, 1)
            bound = dual.bound(self._point)
            if bound.value > best:
                best, best_point = bound.value, self._point.copy()
            if time.perf_counter() > deadline:
                break
            toward = dual.factor[first + bound.choice].sum(axis=0)
            direction += (toward - direction) * (0.3 / (1 + step) if self._warm else 2.0 / (2 + step))
        self._point, self._warm = best_point.copy(), True

    def _passed(self, deadline: float) -> DualBound:
        dual, blocks = self._dual, self._dual.blocks
        price, direction, messages = dual.split(self._point)
        best = dual.bound(self._point)
        cost = dual.cost + dual.use @ price + dual.factor @ direction
        for _ in range(ROUNDS):
            pass_messages(dual.first, cost, blocks.row, blocks.weights, *blocks.incident, messages, SWEEPS)
            bound = dual.bound(self._point)
            gained = bound.value - best.value
            best = bound if gained > 0 else best
            if gained <= SETTLED * abs(best.value) or time.perf_counter() > deadline:
                break
        return best

    def _on_blocks(self, matrix: Any) -> Floats:
        """Lay out a matrix of pair terms as the weights of the blocks."""
        blocks, problem = self._blocks, self.problem
        entries = matrix.tocoo()
        u, v = (coordinate.astype(np.int64) for coordinate in entries.coords)
        first, of, count = problem.group_offsets, problem.group_of, problem.num_groups
        block = np.searchsorted(blocks.group[:, 0] * count + blocks.group[:, 1], of[u] * count + of[v])
        columns = np.diff(first)[blocks.group[:, 1]]
        weights = np.zeros(len(blocks.weights))
        weights[blocks.row[block, 0] + (u - first[of[u]]) * columns[block] + v - first[of[v]]] = entries.data
        return weights
