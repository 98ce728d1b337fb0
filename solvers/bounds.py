"""Proven lower bounds by Lagrangian duality, with a price for every budget.

Three kinds of coupling are relaxed, each with multipliers of its own:

* a budget ``use·x ≤ B`` with a price λ ≥ 0;
* the factor: with ``z = Fᵀx`` as its own variable, ``½‖z‖² - y·(z - Fᵀx)`` is least at ``z = y``, so that y needs only
  r numbers (a group pairs never with itself, hence the cost ``cost - ½‖F_v‖²``);
* a block S_gh of sparse terms between two groups: messages ``a`` and ``b`` move parts of it to the options of g and h
  (the dual of the local polytope; Werner, doi:10.1109/TPAMI.2007.1036).

What is left splits by group and by block,

    d(λ, y, a, b) = Σ_g min_{v∈g} (cost'_v + λ·use_v + y·F_v + Σ a_v) + Σ_gh min_{u,v} (S_uv - a_u - b_v) - λ·B - ½‖y‖²

and every value of this concave function is a lower bound. Linear problems: exact for one budget (by the slopes of the
groups' convex hulls), by the LP's prices for several. With a factor: L-BFGS on softmin in place of min, with a falling
temperature. With blocks: sequential message passing, and a line search for the prices. However the multipliers were
found, the bound that is returned is d itself, with true minima.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse
from numba import njit

from formulations import Problem
from solvers.base import Search
from solvers.moves import Floats, Integers, compiled, to_arrays

COOLING = 0.3
COLDEST = 1e-6
"""Temperatures of softmin, relative to the largest single effect: each `COOLING` of the one before."""

SWEEPS = 10
"""Sweeps of message passing between two looks at a price."""

PRICE_PRECISION = 1.005
PRICE_STEPS = 40
"""With sparse blocks a budget's price is searched to this factor, in so many steps at most."""

STEPS = 200
"""L-BFGS iterations at most at each temperature."""

NEGLIGIBLE = 40.0
"""Beyond this many temperatures above the minimum softmin's weight is taken as 0 (it is below 1e-17)."""

MEMORY = 10
"""Pairs of steps and gradient changes that L-BFGS keeps."""


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


def dual_bound(problem: Problem, *, time_limit: float = float("inf")) -> DualBound:
    """The best Lagrangian bound that is found in ``time_limit`` seconds (any time gives a valid one).

    Without a feasible choice the bound may be as large as the largest objective of any choice, or larger.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> bound = dual_bound(problem)
    >>> bound.value, bound.prices
    (1.0, {'bytes': 0.25})
    """
    dual = Dual(problem)
    return dual.bound(dual.ascend(time.perf_counter() + time_limit) if problem.pairs else dual.linear_prices())


def raise_dual_bound(problem: Problem, search: Search, share: float) -> DualBound:
    """Hand the dual bound and its prices to a search; at most ``share`` of its remaining time is taken.

    A bound that no choice can meet closes the search: nothing is feasible.
    """
    with search.phase("bound_s"):
        bound = dual_bound(problem, time_limit=share * search.remaining())
    search.raise_bound(bound.value)
    search.details["prices"] = bound.prices
    if bound.value > largest_objective(problem):
        search.close()
    return bound


def largest_objective(problem: Problem) -> float:
    """An objective that no choice exceeds; a bound above it proves that no choice is feasible."""
    starts = problem.group_offsets[:-1]
    value = problem.offset + np.maximum.reduceat(problem.cost, starts).sum()
    if problem.pairs.factor is not None:
        value += 0.5 * np.maximum.reduceat(np.linalg.norm(problem.pairs.factor, axis=1), starts).sum() ** 2
    if problem.pairs.num_sparse:
        value += np.maximum(problem.pairs.sparse.data, 0.0).sum()
    return float(value + 1e-9 * abs(value))


class Dual:
    """The function d over one flat vector of multipliers ``(λ, y, messages)``.

    Uses are counted from each group's smallest and in units of what is left of the budget, so that all
    multipliers are about as large as the objective.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.first = problem, problem.group_offsets
        a = to_arrays(problem)
        use, limit = a.use, a.limit
        smallest = np.minimum.reduceat(use, self.first[:-1], axis=0)
        left = limit - smallest.sum(axis=0)
        use = use - smallest[problem.group_of]
        largest = use.max(axis=0, initial=0.0)
        self.unit = np.where(left > 1e-9 * limit, left, np.where(largest > 0, largest, 1.0))
        self.use, self.limit = use / self.unit, left / self.unit
        self.factor = a.factor
        self.cost = problem.cost - 0.5 * np.einsum("vr,vr->v", self.factor, self.factor)
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
            value += _blocks(blocks.row, blocks.weights, messages, 0.0, np.empty(0))[0]
        choice = _decode(self.first, cost, blocks.row, blocks.weights, blocks.group, *blocks.incident, messages)
        prices = dict(zip(self.problem.budgets, (price / self.unit).tolist(), strict=True))
        return DualBound(
            value=float(value), prices=prices, direction=direction, messages=messages, reduced=reduced, choice=choice
        )

    def ascend(self, deadline: float) -> Floats:
        """Multipliers that make d large, for problems with pair terms."""
        enough = largest_objective(self.problem) - self.problem.offset
        if self.factor.shape[1]:
            point = self._descend(deadline, enough)
        else:
            point = np.zeros(self.size)
            point[: len(self.limit)] = self.linear_prices()
        return self._pass_messages(point, deadline, enough) if self.blocks.num_messages else point

    def _descend(self, deadline: float, enough: float) -> Floats:
        """L-BFGS at falling temperatures."""
        arrays = (self.first, self.cost, self.use, self.limit, self.factor, *self.blocks.arrays)
        temperature = self._typical_effect() or 1.0
        coldest = COLDEST * temperature
        point = np.zeros(self.size)
        best, best_point = np.array([-np.inf]), point.copy()
        while temperature > coldest and time.perf_counter() < deadline and best[0] <= enough:
            _descend(*arrays, temperature, point, best, best_point, STEPS, enough)
            temperature *= COOLING
        return best_point

    def _pass_messages(self, point: Floats, deadline: float, enough: float) -> Floats:
        """Message passing between the groups, with a search for the price of each budget in turn."""
        budgets, blocks = len(self.limit), self.blocks
        incident, messages = blocks.incident, point[budgets + self.factor.shape[1] :]
        best, best_point = -np.inf, point.copy()

        def value(k: int, price: float) -> float:
            """The bound after some more sweeps at this price (none once time is up)."""
            nonlocal best, best_point
            if best - self.problem.offset > enough or (time.perf_counter() > deadline and best > -np.inf):
                return -np.inf
            if k < budgets:
                point[k] = price
            cost = self.cost + self.use @ point[:budgets] + self.factor @ self.split(point)[1]
            _sweep(self.first, cost, blocks.row, blocks.weights, *incident, messages, SWEEPS)
            found = self.bound(point).value
            if found > best:
                best, best_point = found, point.copy()
            return found

        smallest = 1e-3 * self._typical_effect()
        for k in [*range(budgets)] * (1 if budgets < 2 else 3):
            price, factor = max(float(best_point[k]), smallest), 2.0
            for _ in range(PRICE_STEPS):
                if factor < PRICE_PRECISION or time.perf_counter() > deadline:
                    break
                up, down, here = value(k, price * factor), value(k, price / factor), value(k, price)
                if not max(up, down) > here + 1e-9 * abs(here):
                    factor **= 0.5
                else:
                    price *= factor if up > down else 1.0 / factor
            point[:] = best_point
        for _ in range(10):
            before = best
            value(budgets, 0.0)
            if best - before < 1e-6 * abs(best):
                break
        return best_point

    def _typical_effect(self) -> float:
        """The mean over the groups of how much the group's own choice can change the Lagrangian cost."""
        own = self.cost + np.square(self.factor).sum(axis=1)
        if self.blocks.num_messages:
            own += abs(self.problem.pairs.sparse).mean(axis=1) + abs(self.problem.pairs.sparse).mean(axis=0)
        starts = self.first[:-1]
        return float((np.maximum.reduceat(own, starts) - np.minimum.reduceat(own, starts)).mean())

    def linear_prices(self) -> Floats:
        """The budgets' best prices when pair terms are left out; zeros when the relaxation has no solution."""
        if len(self.limit) == 0:
            return np.zeros(0)
        if len(self.limit) == 1:
            return np.array([_price_of_one_budget(self.first, self.cost, self.use[:, 0], float(self.limit[0]))])
        options, groups = self.problem.num_options, self.problem.num_groups
        one = scipy.sparse.csr_array(
            (np.ones(options), (self.problem.group_of, np.arange(options))), shape=(groups, options)
        )
        solved = scipy.optimize.linprog(
            self.cost, A_ub=self.use.T, b_ub=self.limit, A_eq=one, b_eq=np.ones(groups), method="highs"
        )
        return np.maximum(0.0, -solved.ineqlin.marginals) if solved.status == 0 else np.zeros(len(self.limit))


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The sparse pair terms as dense blocks between pairs of groups.

    Attributes:
        row: ``(B + 1, 3)`` per block: where its weights start, where its messages start, how many rows it has.
        weights: all blocks, row by row.
        option: per message the flat option it belongs to: a block's rows, then its columns.
        group: ``(B, 2)`` per block the groups of its rows and of its columns.
    """

    row: Integers
    weights: Floats
    option: Integers
    group: Integers
    num_groups: int

    @property
    def arrays(self) -> tuple[Integers, Floats, Integers]:
        """The three, in the order the compiled functions take them."""
        return self.row, self.weights, self.option

    @property
    def incident(self) -> tuple[Integers, Integers]:
        """The blocks of every group, for `_sweep`: where each group's begin, and the blocks with their side."""
        both = np.column_stack([self.group[:, 0], self.group[:, 1]]).ravel()
        order = np.argsort(both, kind="stable")
        return np.concatenate([[0], np.cumsum(np.bincount(both, minlength=self.num_groups))]), order

    @property
    def num_messages(self) -> int:
        """How many multipliers the blocks have."""
        return len(self.option)

    def each(self, messages: Floats) -> Iterator[tuple[Integers, Integers, Floats, Floats, Floats]]:
        """Per block its row options, column options, weights (rows, columns), row messages and column messages."""
        for (weight, message, rows), (weight_end, end, _) in itertools.pairwise(self.row.tolist()):
            middle = message + rows
            weights = self.weights[weight:weight_end].reshape(rows, end - middle)
            upper, lower = slice(message, middle), slice(middle, end)
            yield self.option[upper], self.option[lower], weights, messages[upper], messages[lower]

    @classmethod
    def of(cls, problem: Problem) -> "Blocks":
        """The blocks of a problem."""
        first, group_of = problem.group_offsets, problem.group_of
        if not problem.pairs.num_sparse:
            none = np.zeros(0, np.int64)
            return cls(np.zeros((1, 3), np.int64), np.zeros(0), none, none.reshape(0, 2), problem.num_groups)
        entries = problem.pairs.sparse.tocoo()
        u, v = (coordinate.astype(np.int64) for coordinate in entries.coords)
        pair, block = np.unique(group_of[u] * problem.num_groups + group_of[v], return_inverse=True)
        above, beside = np.divmod(pair, problem.num_groups)
        sizes = np.diff(first)
        rows, columns = sizes[above], sizes[beside]
        weight_start = np.concatenate([[0], np.cumsum(rows * columns)])
        message_start = np.concatenate([[0], np.cumsum(rows + columns)])
        weights = np.zeros(weight_start[-1])
        local = (u - first[group_of[u]]) * columns[block] + v - first[group_of[v]]
        weights[weight_start[block] + local] = entries.data
        starts = np.column_stack([first[above], first[beside]]).ravel()
        lengths = np.column_stack([rows, columns]).ravel()
        ends = np.cumsum(lengths)
        option = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
        row = np.column_stack([weight_start, message_start, np.append(rows, 0)])
        return cls(row, weights, option, np.column_stack([above, beside]), problem.num_groups)


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _dot(a: Floats, b: Floats) -> float:
    """``a·b`` in this thread: BLAS would start threads, which loses more than it gains where cores are shared."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _times(matrix: Floats, vector: Floats) -> Floats:
    """``matrix @ vector``, for a few columns."""
    product = np.zeros(matrix.shape[0])
    for i in range(matrix.shape[0]):
        for j in range(matrix.shape[1]):
            product[i] += matrix[i, j] * vector[j]
    return product


@njit(cache=True, nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _sum_rows(weight: Floats, matrix: Floats) -> Floats:
    """``weight @ matrix``, for a few columns; rows of weight 0 are skipped."""
    total = np.zeros(matrix.shape[1])
    for i in range(matrix.shape[0]):
        if weight[i] != 0.0:
            for j in range(matrix.shape[1]):
                total[j] += weight[i] * matrix[i, j]
    return total


@compiled
def _groups(first: Integers, cost: Floats, temperature: float, share: Floats) -> tuple[float, float]:
    """Sum over the groups of min and of softmin; ``share`` becomes the softmin's weights."""
    exact = soft = 0.0
    for group in range(len(first) - 1):
        begin, end = first[group], first[group + 1]
        least = cost[begin]
        for v in range(begin + 1, end):
            least = min(least, cost[v])
        total = 0.0
        for v in range(begin, end):
            height = (cost[v] - least) / temperature
            share[v] = np.exp(-height) if height < NEGLIGIBLE else 0.0
            total += share[v]
        for v in range(begin, end):
            share[v] /= total
        exact += least
        soft += least - temperature * np.log(total)
    return exact, soft


@compiled
def _decode(
    first: Integers,
    cost: Floats,
    row: Integers,
    weights: Floats,
    group_pair: Integers,
    start: Integers,
    incident: Integers,
    messages: Floats,
) -> Integers:
    """Group after group the local option of least cost, given the choices in the groups before it."""
    groups = len(first) - 1
    choice = np.zeros(groups, np.int64)
    for group in range(groups):
        own = cost[first[group] : first[group + 1]].copy()
        for at in range(start[group], start[group + 1]):
            if incident[at] % 2:  # the group has the columns, so the rows' group came before
                block = incident[at] // 2
                weight, message, rows = row[block]
                columns = row[block + 1, 1] - message - rows
                chosen = choice[group_pair[block, 0]]
                for j in range(columns):
                    own[j] += weights[weight + chosen * columns + j] - messages[message + rows + j]
        choice[group] = np.argmin(own)
    return choice


@compiled
def _sweep(
    first: Integers,
    cost: Floats,
    row: Integers,
    weights: Floats,
    start: Integers,
    incident: Integers,
    messages: Floats,
    sweeps: int,
) -> None:
    """Sequential reweighted message passing, in place (doi:10.1109/TPAMI.2006.200): a sweep never lowers the bound.

    Forward and backward over the groups: a group shares its cost among its blocks ahead, and every such block hands
    what it can be sure of to its other group. ``incident[start[g]:start[g + 1]]`` are the blocks of group g, as
    ``2·block`` where g has its rows and ``2·block + 1`` where g has its columns.
    """
    groups = len(first) - 1
    for turn in range(2 * sweeps):
        side = turn % 2  # forward: to the blocks where the group has the rows
        for step in range(groups):
            group = step if side == 0 else groups - 1 - step
            begin, end = start[group], start[group + 1]
            ahead = 0
            for at in range(begin, end):
                ahead += incident[at] % 2 == side
            if ahead == 0:
                continue
            share = 1.0 / max(ahead, end - begin - ahead)
            own = cost[first[group] : first[group + 1]].copy()
            for at in range(begin, end):
                block = incident[at] // 2
                mine = row[block, 1] + (row[block, 2] if incident[at] % 2 else 0)
                own += messages[mine : mine + len(own)]
            for at in range(begin, end):
                if incident[at] % 2 != side:
                    continue
                block = incident[at] // 2
                weight, message, rows = row[block]
                columns = row[block + 1, 1] - message - rows
                mine, other = (message, message + rows) if side == 0 else (message + rows, message)
                messages[mine : mine + len(own)] -= share * own
                for j in range(columns if side == 0 else rows):
                    least = np.inf
                    for i in range(len(own)):
                        entry = weight + (i * columns + j if side == 0 else j * columns + i)
                        least = min(least, weights[entry] - messages[mine + i])
                    messages[other + j] = least


@compiled
def _blocks(
    row: Integers, weights: Floats, messages: Floats, temperature: float, marginals: Floats
) -> tuple[float, float]:
    """Sum over the blocks of min and of softmin; ``marginals`` become the softmin's row and column sums.

    At temperature 0 only the minima are taken.
    """
    exact = soft = 0.0
    for block in range(len(row) - 1):
        start, message, rows = row[block]
        columns = row[block + 1, 1] - message - rows
        a, b = messages[message : message + rows], messages[message + rows : message + rows + columns]
        least = np.inf
        for i in range(rows):
            for j in range(columns):
                least = min(least, weights[start + i * columns + j] - a[i] - b[j])
        exact += least
        if temperature == 0.0:
            continue
        marginals[message : message + rows + columns] = 0.0
        total = 0.0
        for i in range(rows):
            for j in range(columns):
                height = (weights[start + i * columns + j] - a[i] - b[j] - least) / temperature
                if height > NEGLIGIBLE:
                    continue
                weight = np.exp(-height)
                marginals[message + i] += weight
                marginals[message + rows + j] += weight
                total += weight
        marginals[message : message + rows + columns] /= total
        soft += least - temperature * np.log(total)
    return exact, soft


@compiled
def _smooth(
    first: Integers,
    cost: Floats,
    use: Floats,
    limit: Floats,
    factor: Floats,
    row: Integers,
    weights: Floats,
    option: Integers,
    temperature: float,
    point: Floats,
    gradient: Floats,
) -> tuple[float, float]:
    """-d with softmin, and d with true minima; ``gradient`` is that of the former."""
    budgets, rank = len(limit), factor.shape[1]
    price, direction, messages = point[:budgets], point[budgets : budgets + rank], point[budgets + rank :]
    total = cost + _times(use, price) + _times(factor, direction)
    for m in range(len(messages)):
        total[option[m]] += messages[m]
    share = np.empty(len(cost))
    exact, soft = _groups(first, total, temperature, share)
    slack = _dot(price, limit) + 0.5 * _dot(direction, direction)
    gradient[:budgets] = limit - _sum_rows(share, use)
    gradient[budgets : budgets + rank] = direction - _sum_rows(share, factor)
    if len(messages):
        marginals = gradient[budgets + rank :]
        block_exact, block_soft = _blocks(row, weights, messages, temperature, marginals)
        exact, soft = exact + block_exact, soft + block_soft
        for m in range(len(messages)):
            marginals[m] -= share[option[m]]
    return slack - soft, exact - slack


@compiled
def _descend(
    first: Integers,
    cost: Floats,
    use: Floats,
    limit: Floats,
    factor: Floats,
    row: Integers,
    weights: Floats,
    option: Integers,
    temperature: float,
    point: Floats,
    best: Floats,
    best_point: Floats,
    steps: int,
    enough: float,
) -> None:
    """L-BFGS (Nocedal & Wright, algorithm 7.5) on ``_smooth`` from ``point``, in place; prices stay at or above 0.

    ``best`` and ``best_point`` keep the best d seen; a d above ``enough`` ends the descent.
    """
    size, budgets = len(point), len(limit)
    moves, changes, curvature = np.zeros((MEMORY, size)), np.zeros((MEMORY, size)), np.zeros(MEMORY)
    gradient, new_gradient, alpha = np.empty(size), np.empty(size), np.zeros(MEMORY)
    kept = 0
    tolerance = 1e-3 * temperature * (len(first) - 1)
    value, exact = _smooth(first, cost, use, limit, factor, row, weights, option, temperature, point, gradient)
    earlier = value + 1.0 + 1e3 * abs(value)
    for step in range(steps):
        if exact > best[0]:
            best[0] = exact
            best_point[:] = point
            if exact > enough:
                return
        if step % 10 == 9:
            if earlier - value < tolerance:
                return
            earlier = value
        descent = -gradient
        for k in range(budgets):
            if point[k] <= 0.0 and gradient[k] > 0.0:
                descent[k] = 0.0
        for i in range(kept - 1, max(-1, kept - 1 - MEMORY), -1):
            at = i % MEMORY
            alpha[at] = _dot(moves[at], descent) / curvature[at]
            descent -= alpha[at] * changes[at]
        if kept:
            at = (kept - 1) % MEMORY
            descent *= curvature[at] / _dot(changes[at], changes[at])
        else:
            descent *= temperature / (1e-300 + np.sqrt(_dot(gradient, gradient)))
        for i in range(max(0, kept - MEMORY), kept):
            at = i % MEMORY
            descent += (alpha[at] - _dot(changes[at], descent) / curvature[at]) * moves[at]
        for k in range(budgets):
            if point[k] <= 0.0 and (gradient[k] > 0.0 or descent[k] < 0.0):
                descent[k] = 0.0
        fall = _dot(gradient, descent)
        if not fall < -1e-3 * tolerance:
            return
        length = 1.0
        while True:
            new_point = point + length * descent
            for k in range(budgets):
                new_point[k] = max(0.0, new_point[k])
            new_value, exact = _smooth(
                first, cost, use, limit, factor, row, weights, option, temperature, new_point, new_gradient
            )
            if new_value <= value + 1e-4 * length * fall:
                break
            length *= 0.5
            if length < 1e-10:
                return
        move, change = new_point - point, new_gradient - gradient
        if _dot(move, change) > 1e-12 * _dot(change, change) > 1e-200:
            at = kept % MEMORY
            moves[at], changes[at], curvature[at] = move, change, _dot(move, change)
            kept += 1
        point[:], gradient[:], value = new_point, new_gradient, new_value


def _price_of_one_budget(first: Integers, cost: Floats, use: Floats, limit: float) -> float:
    """The best price of a single budget: where the cheapest steps along the groups' convex hulls fill it.

    Sinha & Zoltners, doi:10.1287/opre.27.3.503.
    """
    slope, step = _hull_steps(first, cost, use)
    order = np.argsort(-slope, kind="stable")
    filled = np.cumsum(step[order])
    at = int(np.searchsorted(filled, limit, side="right"))
    return float(slope[order[at]]) if at < len(order) else 0.0


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
