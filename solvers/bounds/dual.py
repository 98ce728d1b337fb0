"""The Lagrangian dual function of a problem and the search for good multipliers; see `solvers.bounds.duality`."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from formulations import PairTerms, Problem
from solvers.bounds.messages import SparseBlocks, block_minima, decode, pass_messages
from solvers.bounds.smoothed_dual import DualTerms, descend
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers, to_arrays

COOLING = 0.3
COLDEST = 1e-6
"""Ratio of consecutive temperatures of softmin, and the last one relative to the typical effect of one group."""

SWEEPS = 10
"""Number of message-passing sweeps per evaluation of a price."""

FIRST_STEP, PRICE_PRECISION = 2.0, 1.005
PRICE_STEPS = 40
"""First and last factor by which a budget's price is changed with sparse blocks, and the maximum number of steps."""

STEPS = 200
"""Maximum number of L-BFGS iterations at each temperature."""

SPEED = 2e8
"""Numbers of the factor that iterations process per second, a low estimate for a busy machine."""

LINEAR_PROGRAM = 10_000
"""Maximum number of options for which a linear program gives the exact prices of several budgets, in half a second."""

SAMPLE, SETTLED = 30_000, 1e-3
"""With more than twice this number of groups, multipliers are first found for a sample of this size, and then for all
groups, starting at this fraction of the first temperature."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DualBound:
    """A proven lower bound, with the multipliers that prove it.

    Attributes:
        value: the bound; no feasible choice has a smaller objective.
        prices: name of a budget → λ ≥ 0, the decrease of the bound per additional unit of its resource.
        direction: ``(r,)`` multipliers y of the factor.
        messages: multipliers of the sparse blocks, in the order of ``SparseBlocks.option``.
        reduced: ``(V,)`` reduced costs, not negative. A feasible choice that takes v has an objective of at least
            ``value + reduced[v]``; without sparse terms, the reduced costs of several groups add up.
        choice: ``(G,)`` in each group the local option with the smallest reduced cost, including the blocks to previous
            groups; the choice may exceed budgets.
    """

    value: float
    prices: dict[str, float]
    direction: Floats
    messages: Floats
    reduced: Floats
    choice: Integers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ascent:
    """State of a search for multipliers, from which another search can resume.

    Attributes:
        point: the best multipliers so far, as a flat vector of `Dual`.
        temperature: temperature of softmin at which cooling resumes; at most the last temperature when it is done.
        step: factor by which prices are changed between sweeps of messages.
    """

    point: Floats
    temperature: float
    step: float = FIRST_STEP


def largest_objective(problem: Problem) -> float:
    """Return an objective that no choice exceeds; a lower bound above it proves that no choice is feasible."""
    starts = problem.group_offsets[:-1]
    value = problem.offset + np.maximum.reduceat(problem.cost, starts).sum()
    if problem.pairs.factor is not None:
        square = np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor)
        value += 0.5 * np.sqrt(np.maximum.reduceat(square, starts)).sum() ** 2
    if problem.pairs.num_sparse:
        value += np.maximum(problem.pairs.sparse.data, 0.0).sum()
    return float(value + 1e-9 * abs(value))


class Dual:
    """The dual function d of a flat vector of multipliers ``(λ, y, messages)``.

    Each group's smallest use is subtracted from its uses, and units are chosen so that all multipliers are about
    equally large.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.first = problem, problem.group_offsets
        a = to_arrays(problem)
        use, limit = a.use, a.limit
        smallest = np.minimum.reduceat(use, self.first[:-1], axis=0)
        left = limit - smallest.sum(axis=0)
        use = use - smallest[problem.group_of]
        largest = use.max(axis=0, initial=0.0)
        self.factor = a.factor
        square = np.einsum("vr,vr->v", self.factor, self.factor)
        if square.any():  # a price then changes costs about as much as an equally large multiplier of the factor
            unit = np.linalg.norm(use, axis=0) / np.sqrt(square.sum())
        else:
            unit = np.where(left > 1e-9 * limit, left, largest)
        self.unit = np.where(unit > 0, unit, 1.0)
        self.use, self.limit = use / self.unit, left / self.unit
        self.cost = problem.cost - 0.5 * square
        self.blocks = SparseBlocks.of(problem)

    @property
    def size(self) -> int:
        """Number of multipliers."""
        return int(len(self.limit) + self.factor.shape[1] + self.blocks.num_messages)

    def split(self, point: Floats) -> tuple[Floats, Floats, Floats]:
        """Split a flat vector into ``(λ, y, messages)``."""
        budgets, rank = len(self.limit), self.factor.shape[1]
        return point[:budgets], point[budgets : budgets + rank], point[budgets + rank :]

    def lagrangian_cost(self, point: Floats) -> Floats:
        """Return the cost of each option at the multipliers ``(V,)``."""
        price, direction, messages = self.split(point)
        cost: Floats = self.cost + self.use @ price + self.factor @ direction
        if len(messages):
            cost += np.bincount(self.blocks.option, weights=messages, minlength=len(cost))
        return cost

    def bound(self, point: Floats) -> DualBound:
        """Compute the bound at the multipliers, with true minima."""
        price, direction, messages = self.split(point)
        cost = self.lagrangian_cost(point)
        least = np.minimum.reduceat(cost, self.first[:-1])
        reduced = cost - least[self.problem.group_of]
        value = self.problem.offset + least.sum() - price @ self.limit - 0.5 * direction @ direction
        blocks = self.blocks
        if len(messages):
            value += block_minima(blocks.row, blocks.weights, messages, 0.0, np.empty(0))[0]
        choice = decode(self.first, cost, blocks.row, blocks.weights, blocks.group, *blocks.incident, messages)
        prices = dict(zip(self.problem.budgets, (price / self.unit).tolist(), strict=True))
        return DualBound(
            value=float(value), prices=prices, direction=direction, messages=messages, reduced=reduced, choice=choice
        )

    def ascend(self, deadline: float, begun: Ascent | None = None) -> Ascent:
        """Maximise d for problems with pair terms, optionally resuming an earlier ascent."""
        enough = largest_objective(self.problem) - self.problem.offset
        if self.factor.shape[1]:
            ascent = self._by_temperature(deadline, enough, begun)
        elif begun is not None:
            ascent = begun
        else:
            point = np.zeros(self.size)
            point[: len(self.limit)] = self.linear_prices(deadline)
            ascent = Ascent(point=point, temperature=0.0)
        if not self.blocks.num_messages:
            return ascent
        return self._pass_messages(ascent, deadline, enough)

    def _by_temperature(self, deadline: float, enough: float, begun: Ascent | None = None) -> Ascent:
        """Maximise d by L-BFGS at falling temperatures."""
        point, temperature = np.zeros(self.size), self.typical_effect() or 1.0
        coldest = COLDEST * temperature
        if begun is not None:
            point, temperature = begun.point, begun.temperature
        elif self.problem.num_groups > 2 * SAMPLE and not self.blocks.num_messages:
            scale = np.ones(self.size)
            scale[len(self.limit) :] = np.sqrt(self.problem.num_groups / SAMPLE)
            point = scale * _cooled(self._sampled(), point, (temperature, coldest), deadline, np.inf).point
            temperature *= SETTLED
        arrays = (self.first, self.cost, self.use, self.limit, self.factor, *self.blocks.arrays)
        return _cooled(arrays, point, (temperature, coldest), deadline, enough)

    def _sampled(self) -> tuple[Any, ...]:
        """Return the arrays of `SAMPLE` random groups, with budgets and factor scaled to have similar multipliers.

        For a fraction s of the groups, the expectation of ``s·d`` is the dual of the sample with budgets ``s·B`` and
        the factor ``F/√s``, whose multipliers are ``√s·y``.
        """
        groups = self.problem.num_groups
        drawn = np.zeros(groups, dtype=bool)
        drawn[np.random.default_rng(0).choice(groups, SAMPLE, replace=False)] = True
        rows, share = drawn[self.problem.group_of], SAMPLE / groups
        first = np.concatenate([[0], np.cumsum(np.diff(self.first)[drawn])])
        factor = self.factor[rows] / np.sqrt(share)
        factor.flags.writeable = False  # like the full factor, since kernels are compiled for one kind of array
        return first, self.cost[rows], self.use[rows], self.limit * share, factor, *self.blocks.arrays

    def _pass_messages(self, begun: Ascent, deadline: float, enough: float) -> Ascent:
        """Pass messages between the groups, with a line search for the price of each budget in turn."""
        budgets, blocks = len(self.limit), self.blocks
        point, best_point, factor = begun.point.copy(), begun.point, begun.step
        incident, messages = blocks.incident, point[budgets + self.factor.shape[1] :]
        best = self.bound(point).value if factor < FIRST_STEP else -np.inf

        def value(k: int, price: float) -> float:
            """Compute the bound after further sweeps at this price (no sweeps once the time is over)."""
            nonlocal best, best_point
            if best - self.problem.offset > enough or (time.perf_counter() > deadline and best > -np.inf):
                return -np.inf
            if k < budgets:
                point[k] = price
            cost = self.cost + self.use @ point[:budgets] + self.factor @ self.split(point)[1]
            pass_messages(self.first, cost, blocks.row, blocks.weights, *incident, messages, SWEEPS)
            bound = self.bound(point).value
            if bound > best:
                best, best_point = bound, point.copy()
            return bound

        smallest = 1e-3 * self.typical_effect()
        for k in [*range(budgets)] * (1 if budgets < 2 else 3):
            price = max(float(best_point[k]), smallest)
            for _ in range(PRICE_STEPS):
                if factor < PRICE_PRECISION or time.perf_counter() > deadline:
                    break
                up, down, current = value(k, price * factor), value(k, price / factor), value(k, price)
                if not max(up, down) > current + 1e-9 * abs(current):
                    factor **= 0.5
                else:
                    price *= factor if up > down else 1.0 / factor
            point[:] = best_point
            if time.perf_counter() > deadline:
                return replace(begun, point=best_point, step=factor)
            factor = FIRST_STEP
        for _ in range(10):
            before = best
            value(budgets, 0.0)
            if best - before < 1e-6 * abs(best):
                break
        return replace(begun, point=best_point, step=PRICE_PRECISION)

    def typical_effect(self) -> float:
        """Return how much the choice of one group can change the Lagrangian cost, averaged over groups."""
        effect = self.cost + np.square(self.factor).sum(axis=1)
        if self.blocks.num_messages:
            effect += abs(self.problem.pairs.sparse).mean(axis=1) + abs(self.problem.pairs.sparse).mean(axis=0)
        starts = self.first[:-1]
        return float((np.maximum.reduceat(effect, starts) - np.minimum.reduceat(effect, starts)).mean())

    def linear_prices(self, deadline: float) -> Floats:
        """Return the budgets' best prices without pair terms; zeros when the linear relaxation is infeasible.

        For several budgets in a large problem they are found by cooling, to about seven digits of the bound.
        """
        if len(self.limit) == 0:
            return np.zeros(0)
        if len(self.limit) == 1:
            return np.array([price_of_one_budget(self.first, self.cost, self.use[:, 0], float(self.limit[0]))])
        options, groups = self.problem.num_options, self.problem.num_groups
        if options > LINEAR_PROGRAM:
            alone = Dual(self.problem.derived(pairs=PairTerms())) if self.problem.pairs else self
            ascent = alone._by_temperature(deadline, np.inf)  # noqa: SLF001 - same class
            return ascent.point / alone.unit * self.unit
        one_option_each = scipy.sparse.csr_array(
            (np.ones(options), (self.problem.group_of, np.arange(options))), shape=(groups, options)
        )
        solved = scipy.optimize.linprog(
            self.cost, A_ub=self.use.T, b_ub=self.limit, A_eq=one_option_each, b_eq=np.ones(groups), method="highs"
        )
        return np.maximum(0.0, -solved.ineqlin.marginals) if solved.status == 0 else np.zeros(len(self.limit))


def _cooled(
    arrays: tuple[Any, ...], point: Floats, temperatures: tuple[float, float], deadline: float, enough: float
) -> Ascent:
    """Run L-BFGS at temperatures falling from the first to the second; return the point with the largest d."""
    (temperature, coldest), size = temperatures, arrays[4].size + len(point)
    point, best, best_point = point.copy(), np.array([-np.inf]), point.copy()
    while temperature > coldest and best[0] <= enough:
        left = deadline - time.perf_counter()
        if left <= 0.0:
            break
        steps = min(STEPS, 1 + SPEED * left / size)
        descend(DualTerms(*arrays), temperature, point, best, best_point, int(steps), enough)
        temperature *= COOLING
    return Ascent(point=best_point, temperature=temperature)


def price_of_one_budget(first: Integers, cost: Floats, use: Floats, limit: float) -> float:
    """Return the best price of a single budget, at which the best steps along the groups' convex hulls fill it.

    Sinha & Zoltners, doi:10.1287/opre.27.3.503.
    """
    slope, step = _hull_steps(first, cost, use)
    order = np.argsort(-slope, kind="stable")
    filled = np.cumsum(step[order])
    last_step = int(np.searchsorted(filled, limit, side="right"))
    return float(slope[order[last_step]]) if last_step < len(order) else 0.0


@compiled
def _hull_steps(first: Integers, cost: Floats, use: Floats) -> tuple[Floats, Floats]:
    """Return the steps along the lower left convex hulls, from each group's smallest use: gain per use, and use."""
    slope, step = np.empty(len(cost)), np.empty(len(cost))
    count = 0
    for group in range(len(first) - 1):
        options = first[group] + np.argsort(use[first[group] : first[group + 1]])
        hull = np.empty(len(options), np.int64)
        size = 0
        for v in options:
            if size and cost[v] >= cost[hull[size - 1]]:
                continue
            while size and use[v] == use[hull[size - 1]]:
                size -= 1
            while size > 1:
                a, b = hull[size - 2], hull[size - 1]
                if (cost[a] - cost[b]) * (use[v] - use[b]) > (cost[b] - cost[v]) * (use[b] - use[a]):
                    break
                size -= 1
            hull[size] = v
            size += 1
        for i in range(1, size):
            step[count] = use[hull[i]] - use[hull[i - 1]]
            slope[count] = (cost[hull[i - 1]] - cost[hull[i]]) / step[count]
            count += 1
    return slope[:count], step[:count]
