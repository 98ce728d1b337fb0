"""The Lagrangian dual function of a problem and the search for good multipliers; see `solvers.bounds.duality`."""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse

from formulations import PairTerms, Problem
from solvers.bounds.messages import Blocks, block_minima, decode, pass_messages
from solvers.bounds.smoothed_dual import DualTerms, descend
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers, to_arrays

COOLING = 0.3
COLDEST = 1e-6
"""Temperatures of softmin, relative to what a group's own choice typically changes: each `COOLING` of the last."""

SWEEPS = 10
"""Sweeps of message passing between two looks at a price."""

FIRST_STEP, PRICE_PRECISION = 2.0, 1.005
PRICE_STEPS = 40
"""Factors by which a budget's price is moved first and last with sparse blocks, and the maximum number of steps."""

STEPS = 200
"""L-BFGS iterations at most at each temperature."""

SPEED = 2e8
"""Numbers of the factor that an iteration goes through in a second, at least, on a busy machine."""

LINEAR_PROGRAM = 10_000
"""Up to so many options the prices of several budgets come from the linear program, exactly; it takes half a second."""

SAMPLE, SETTLED = 30_000, 1e-3
"""With over twice so many groups the multipliers are first found for a sample of them, then for all, from this share of
the first temperature on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DualBound:
    """A proven bound and the multipliers behind it.

    Attributes:
        value: no feasible choice has an objective below it.
        prices: per budget λ ≥ 0: by how much the bound falls per unit of resource that is added to the budget.
        direction: ``(r,)`` multipliers y of the factor.
        messages: multipliers of the sparse blocks, in the order of ``Blocks.option``.
        reduced: ``(V,)``, not negative: a feasible choice that takes v has an objective of at least
            ``value + reduced[v]``; for several groups these add up when there are no sparse terms.
        choice: ``(G,)`` the local option with the smallest reduced cost, what the blocks to the groups before it add
            included; it may break budgets.
    """

    value: float
    prices: dict[str, float]
    direction: Floats
    messages: Floats
    reduced: Floats
    choice: Integers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ascent:
    """How far a search for multipliers has come, so that another one can go on from there.

    Attributes:
        point: the best multipliers so far, as `Dual` states them.
        temperature: of softmin, where cooling goes on; at most the coldest when it is done.
        step: factor by which prices are moved between sweeps of messages.
    """

    point: Floats
    temperature: float
    step: float = FIRST_STEP


def largest_objective(problem: Problem) -> float:
    """An objective that no choice exceeds; a bound above it proves that no choice is feasible."""
    starts = problem.group_offsets[:-1]
    value = problem.offset + np.maximum.reduceat(problem.cost, starts).sum()
    if problem.pairs.factor is not None:
        square = np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor)
        value += 0.5 * np.sqrt(np.maximum.reduceat(square, starts)).sum() ** 2
    if problem.pairs.num_sparse:
        value += np.maximum(problem.pairs.sparse.data, 0.0).sum()
    return float(value + 1e-9 * abs(value))


class Dual:
    """The function d over one flat vector of multipliers ``(λ, y, messages)``.

    Uses are counted from each group's smallest, and in units that make all multipliers about equally large.
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
        if square.any():  # a price then moves costs about as much as an equally large multiplier of the factor does
            unit = np.linalg.norm(use, axis=0) / np.sqrt(square.sum())
        else:
            unit = np.where(left > 1e-9 * limit, left, largest)
        self.unit = np.where(unit > 0, unit, 1.0)
        self.use, self.limit = use / self.unit, left / self.unit
        self.cost = problem.cost - 0.5 * square
        self.blocks = Blocks.of(problem)

    @property
    def size(self) -> int:
        """How many multipliers there are."""
        return int(len(self.limit) + self.factor.shape[1] + self.blocks.num_messages)

    def split(self, point: Floats) -> tuple[Floats, Floats, Floats]:
        """``(λ, y, messages)`` of a flat vector."""
        budgets, rank = len(self.limit), self.factor.shape[1]
        return point[:budgets], point[budgets : budgets + rank], point[budgets + rank :]

    def lagrangian_cost(self, point: Floats) -> Floats:
        """``(V,)`` what each option costs at the multipliers."""
        price, direction, messages = self.split(point)
        cost: Floats = self.cost + self.use @ price + self.factor @ direction
        if len(messages):
            cost += np.bincount(self.blocks.option, weights=messages, minlength=len(cost))
        return cost

    def bound(self, point: Floats) -> DualBound:
        """The bound at the multipliers, with true minima."""
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
        """Multipliers that make d large, for problems with pair terms; from where an earlier ascent was cut."""
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
        """L-BFGS at falling temperatures."""
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
        """The arrays of `SAMPLE` random groups, with a budget and a factor such that the best multipliers are alike.

        With a share s of the groups ``s·d`` is, in expectation, the dual of the sample with budgets ``s·B`` and with
        ``F/√s`` for the factor, whose multipliers are ``√s·y``.
        """
        groups = self.problem.num_groups
        drawn = np.zeros(groups, dtype=bool)
        drawn[np.random.default_rng(0).choice(groups, SAMPLE, replace=False)] = True
        rows, share = drawn[self.problem.group_of], SAMPLE / groups
        first = np.concatenate([[0], np.cumsum(np.diff(self.first)[drawn])])
        factor = self.factor[rows] / np.sqrt(share)
        factor.flags.writeable = False  # as the whole one is: compiled code is made for one kind of array
        return first, self.cost[rows], self.use[rows], self.limit * share, factor, *self.blocks.arrays

    def _pass_messages(self, begun: Ascent, deadline: float, enough: float) -> Ascent:
        """Message passing between the groups, with a search for the price of each budget in turn."""
        budgets, blocks = len(self.limit), self.blocks
        point, best_point, factor = begun.point.copy(), begun.point, begun.step
        incident, messages = blocks.incident, point[budgets + self.factor.shape[1] :]
        best = self.bound(point).value if factor < FIRST_STEP else -np.inf

        def value(k: int, price: float) -> float:
            """The bound after some more sweeps at this price (none once time is up)."""
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
                up, down, here = value(k, price * factor), value(k, price / factor), value(k, price)
                if not max(up, down) > here + 1e-9 * abs(here):
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
        """The mean over the groups of how much the group's own choice can change the Lagrangian cost."""
        effect = self.cost + np.square(self.factor).sum(axis=1)
        if self.blocks.num_messages:
            effect += abs(self.problem.pairs.sparse).mean(axis=1) + abs(self.problem.pairs.sparse).mean(axis=0)
        starts = self.first[:-1]
        return float((np.maximum.reduceat(effect, starts) - np.minimum.reduceat(effect, starts)).mean())

    def linear_prices(self, deadline: float) -> Floats:
        """The budgets' best prices when pair terms are left out; zeros when the relaxation has no solution.

        Those of several budgets in a large problem are found by temperature, to about seven digits of the bound.
        """
        if len(self.limit) == 0:
            return np.zeros(0)
        if len(self.limit) == 1:
            return np.array([price_of_one_budget(self.first, self.cost, self.use[:, 0], float(self.limit[0]))])
        options, groups = self.problem.num_options, self.problem.num_groups
        if options > LINEAR_PROGRAM:
            alone = Dual(self.problem.derived(pairs=PairTerms())) if self.problem.pairs else self
            ascent = alone._by_temperature(deadline, np.inf)  # noqa: SLF001 - of the same class
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
    """L-BFGS at temperatures falling from the first to the second; the point with the best d that was met."""
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
    """The best price of a single budget: where the cheapest steps along the groups' convex hulls fill it.

    Sinha & Zoltners, doi:10.1287/opre.27.3.503.
    """
    slope, step = _hull_steps(first, cost, use)
    order = np.argsort(-slope, kind="stable")
    filled = np.cumsum(step[order])
    last_step = int(np.searchsorted(filled, limit, side="right"))
    return float(slope[order[last_step]]) if last_step < len(order) else 0.0


@compiled
def _hull_steps(first: Integers, cost: Floats, use: Floats) -> tuple[Floats, Floats]:
    """Steps along the lower left convex hulls, from each group's smallest use: gain per use, and use."""
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
