"""The doubly nonnegative bound, for problems of a few hundred options whose pair terms all interact.

The dual of `solvers.bounds.duality` does not charge a group for mixing its options. On networks of few layers with
strong interactions this weakens the bound by 5 to 200 %. Here products of options become separate variables. With
``y = (1, x, t)``, where ``t_k`` is the unused part of budget k (relative to the range of uses), the matrix ``Y = y·yᵀ``
is relaxed to

    Y positive semidefinite,  Y ≥ 0,  Y_uv = 0 and Y_vv = Y_0v inside a group,  Y within the face

where the face consists of the matrices whose rows satisfy the equations ``Σ_{v in g} x_v = 1`` and ``t = B - use·x``.
The relaxation is solved by the alternating direction method of multipliers on the face (Oliveira, Wolkowicz & Xu, arXiv
1512.05448), with one eigenvalue decomposition per iteration. Options are scaled by the square root of their
interaction; without scaling the method would take hundreds of times as long.

Before a bound is computed, the multipliers Z are made feasible by removing the part that is positive on the face. The
bound is then a sum of true minima, so it is valid after any number of iterations.

`convexified` uses the same method for another purpose (QCR; Billionnet, Elloumi & Plateau,
doi:10.1016/j.dam.2007.12.007): an equivalent problem whose convex relaxation is as tight as a semidefinite one.
"""

import time
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from formulations import PairTerms, Problem
from solvers.bounds.duality import dual_bound
from solvers.bounds.signs import dense_products
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers, to_arrays

ITERATIONS = 1000
"""Maximum number of iterations."""

LOOK = 20
"""Number of iterations between two checks of the bound, the clock and the step size."""

USEFUL = 4
"""Number of checks after which a bound is useful."""

PATIENCE, STAGNATION = 10, 0.05
"""The method ends if this many checks together close less than this fraction of the gap to the target."""

SMALLEST_SCALE = 0.01
"""Minimum scale of an option, relative to the 90 % quantile, before the root is taken."""

CONSTANT_SCALE = 1 / 6
"""Scale of the constant and of the unused budgets, relative to that of an option and to the root of their number; with
a smaller one, problems in which almost all items fit in a knapsack take many times as long."""

STEP = 1.618
"""Step length of the multipliers; below the golden ratio the method converges."""

FASTEST = 1.2e-10
"""Time of an iteration in seconds on a fast machine, divided by the cube of the number of options."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SemidefiniteBound:
    """A proven lower bound from the semidefinite relaxation.

    Attributes:
        value: the bound; no feasible choice has a smaller objective.
        at_least: ``(V,)`` bounds by option; no feasible choice that takes option v has a smaller objective.
        share: ``(V,)`` value of each option in the relaxed solution; sums to 1 in every group.
        iterations: number of iterations of the method.
        state: state from which the method continues with the same problem.
    """

    value: float
    at_least: Floats
    share: Floats
    iterations: int
    state: "Lift"


def semidefinite_bound(
    problem: Problem,
    *,
    target: float = float("inf"),
    time_limit: float = float("inf"),
    start: "Lift | None" = None,
) -> SemidefiniteBound:
    """Compute the best doubly nonnegative bound found in ``time_limit`` seconds.

    Args:
        problem: any problem; an iteration takes the time and memory of an eigenvalue decomposition with V rows.
        target: a sufficient bound (an incumbent's objective), at which the method ends.
        time_limit: maximum time in seconds; at least one iteration is always run.
        start: the state at which an earlier call ended; continued if the problem is the same.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> bound = semidefinite_bound(problem)
    >>> bound.value > 0.99, [round(share) for share in bound.share.tolist()]
    (True, [1, 0, 0, 1])
    """
    deadline = time.perf_counter() + time_limit
    lift = start if start is not None and start.states(problem) else Lift(problem, nonnegative=True)
    value, at_least, looks = -np.inf, np.full(problem.num_options, -np.inf), []
    last = lift.iterations + ITERATIONS
    while lift.iterations < last:
        lift.advance(deadline)
        latest, options = lift.bound()
        value, at_least = max(value, latest), np.maximum(at_least, options)
        looks.append(value)
        missing = min(target, lift.objective()) - value
        stagnates = len(looks) > PATIENCE and value - looks[-1 - PATIENCE] < STAGNATION * missing
        if value >= target or stagnates or time.perf_counter() > deadline:
            break
    return SemidefiniteBound(
        value=value, at_least=np.maximum(at_least, value), share=lift.share, iterations=lift.iterations, state=lift
    )


def useful_within(seconds: float, num_options: int) -> bool:
    """Whether a useful bound, which takes `USEFUL` checks, is computed in time; one projection is timed to find out.

    The time of an eigenvalue decomposition differs by a factor of ten between machines, and with what else they run.

    >>> useful_within(np.inf, 8), useful_within(0.0, 8)
    (True, False)
    """
    per_iteration = seconds / (LOOK * USEFUL)
    return FASTEST * num_options**3 <= per_iteration and _projection_s(num_options) <= per_iteration


def _projection_s(size: int) -> float:
    """Measure the time in seconds of a projection as in `_positive_part`, for a dense matrix of a size."""
    rows = np.random.default_rng(0).normal(size=(size, size))
    begun = time.perf_counter()
    _positive_part(rows, rows + rows.T)
    return time.perf_counter() - begun


def convexified(problem: Problem, *, time_limit: float = float("inf")) -> Problem:
    """Return an equivalent problem whose pair terms are a factor F with the tightest possible convex relaxation.

    Every choice has the same objective and use in both problems. The relaxation of ``½‖Fᵀx‖²`` to fractional x is tight
    if a group gains little by mixing its options. Products inside a group are arbitrary and are chosen to achieve this.

    >>> from formulations.generators.random_instances import layered_problem
    >>> problem = layered_problem(6, seed=1)
    >>> tight = convexified(problem)
    >>> abs(tight.evaluate([1] * 6).objective - problem.evaluate([1] * 6).objective) < 1e-9
    True
    """
    deadline = time.perf_counter() + time_limit
    lift = Lift(problem, nonnegative=False)
    while lift.iterations < ITERATIONS // 2 and time.perf_counter() < deadline:
        lift.advance()
    return lift.equal_problem()


class Lift:
    """The matrices of the method; index 0 is the constant, followed by the V options and one slack per budget."""

    def __init__(self, problem: Problem, *, nonnegative: bool) -> None:
        self.problem, self.nonnegative = problem, nonnegative
        self.first, groups = problem.group_offsets, problem.group_of
        self.apart = groups[:, None] != groups[None, :]
        a = to_arrays(problem)
        smallest = np.minimum.reduceat(a.use, self.first[:-1], axis=0)
        slack = a.limit - smallest.sum(axis=0)
        use = a.use - smallest[groups]
        largest = use.max(axis=0, initial=0.0)
        unit = np.where(slack > 1e-9 * a.limit, slack, np.where(largest > 0, largest, 1.0))
        self.use, self.limit = use / unit, slack / unit  # t = limit - use·x lies between 0 and limit ≤ 1

        self.products = dense_products(problem)
        options, size = problem.num_options, 1 + problem.num_options + len(self.limit)
        self.options = slice(1, 1 + options)
        cost = np.zeros((size, size))
        cost[self.options, self.options] = 0.5 * self.products
        cost[0, self.options] = cost[self.options, 0] = 0.5 * problem.cost

        self.basis = self._face(size)
        scale = np.ones(size)
        scale[self.options] = _interaction(self.products)
        larger = max(1.0, CONSTANT_SCALE * np.sqrt(options))
        scale[0] = scale[1 + options :] = larger * np.sqrt(np.mean(np.square(scale[self.options])))
        self.scale, self.scales = scale, np.outer(scale, scale)
        self.face = np.linalg.qr(scale[:, None] * self.basis)[0]
        self.cost = cost / self.scales
        self.unit = float(np.linalg.norm(self.cost)) / np.sqrt(size) or 1.0
        self.cost /= self.unit

        start = scale * self.basis[:, 0]
        self.Y, self.Z = np.outer(start, start), np.zeros((size, size))
        self.penalty, self.iterations = 0.5, 0
        option_scale = scale[self.options]
        self.weight = 2 * (scale[0] * option_scale) ** 2 + option_scale**4

    def _face(self, size: int) -> Floats:
        """Return columns that span all vectors y that meet the equations; the first has equal shares of all options."""
        sizes = np.diff(self.first)
        blocks = [scipy.linalg.null_space(np.ones((1, n))) if n > 1 else np.zeros((1, 0)) for n in sizes]
        within = scipy.linalg.block_diag(*blocks)
        basis = np.zeros((size, 1 + within.shape[1]))
        basis[0, 0] = 1.0
        basis[self.options, 0] = np.repeat(1.0 / sizes, sizes)
        basis[self.options, 1:] = within
        basis[self.options.stop :] = np.outer(self.limit, basis[0]) - self.use.T @ basis[self.options]
        return basis

    def states(self, problem: Problem) -> bool:
        """Whether these are the matrices of a problem."""
        return self.problem is problem or self.problem.fingerprint() == problem.fingerprint()

    @property
    def share(self) -> Floats:
        """The vector x of the relaxation ``(V,)``."""
        share: Floats = self.Y[0, self.options] / self.scale[0] / self.scale[self.options]
        return share

    def objective(self) -> float:
        """Objective of the current iterate, which need not be feasible for the relaxation."""
        return float(np.vdot(self.cost, self.Y)) * self.unit + self.problem.offset

    def advance(self, deadline: float = float("inf")) -> None:
        """Run `LOOK` iterations, fewer at the deadline; adapt the penalty to balance primal and dual residuals."""
        primal = dual = 0.0
        for _ in range(LOOK):
            inside = _positive_part(self.face, self.Y + self.Z / self.penalty)
            nearest = self._within_bounds(inside - (self.cost + self.Z) / self.penalty)
            change = nearest - inside
            self.Z += STEP * self.penalty * change
            primal = float(np.linalg.norm(change) / (1 + np.linalg.norm(nearest)))
            dual = self.penalty * float(np.linalg.norm(nearest - self.Y) / (1 + np.linalg.norm(self.cost)))
            self.Y = nearest
            self.iterations += 1
            if time.perf_counter() > deadline:
                break
        if primal > 2 * dual:
            self.penalty *= 1.4
        elif dual > 2 * primal:
            self.penalty /= 1.4

    def _within_bounds(self, matrix: Floats) -> Floats:
        """Return the nearest nonnegative matrix with the zeros and equal entries that the groups require."""
        options, scale = self.options, self.scale[self.options]
        nearest = np.maximum(matrix, 0.0) if self.nonnegative else matrix.copy()
        nearest[0, options.stop :] = nearest[options.stop :, 0] = np.maximum(matrix[0, options.stop :], 0.0)
        nearest[0, 0] = self.scale[0] ** 2
        diagonal = np.diagonal(matrix)[options]
        share = (2 * self.scale[0] * scale * matrix[0, options] + scale**2 * diagonal) / self.weight
        share = _nearest_shares(share, self.weight, self.first)
        nearest[options, options] *= self.apart
        nearest[0, options] = nearest[options, 0] = self.scale[0] * scale * share
        diagonal_entries = np.arange(options.start, options.stop)
        nearest[diagonal_entries, diagonal_entries] = scale**2 * share
        return nearest

    def bound(self) -> tuple[float, Floats]:
        """Return the bound that the multipliers prove, and a bound for every option."""
        feasible = self.Z - _positive_part(self.face, self.Z)
        rest = (self.cost + feasible) * self.scales * self.unit
        options, slacks = self.options, slice(self.options.stop, None)
        on_slack = 2 * rest[0, slacks]  # multiplied by t = limit - use·x
        linear = 2 * rest[0, options] + np.diagonal(rest)[options] - self.use @ on_slack
        linear += 2 * np.minimum(0.0, rest[slacks, options]).sum(axis=0)  # t is at most 1
        constant = rest[0, 0] + on_slack @ self.limit + np.minimum(0.0, rest[slacks, slacks]).sum()
        starts, groups = self.first[:-1], self.problem.group_of
        rows = np.minimum.reduceat(np.where(self.apart, rest[options, options], np.inf), starts, axis=1)
        rows[np.arange(len(groups)), groups] = 0.0
        blocks = np.minimum.reduceat(rows, starts, axis=0)
        problem = self.problem
        decided = dual_bound(problem.derived(cost=linear, pairs=PairTerms()))
        value = decided.value + float(constant + blocks.sum())
        return value, value + decided.reduced + 2 * (rows - blocks[groups]).sum(axis=1)

    def equal_problem(self) -> Problem:
        """Return the equivalent problem, with products inside groups chosen by the multipliers (see `convexified`)."""
        options, problem = self.options, self.problem
        chosen = -self.Z[options, options] * self.scales[options, options] * self.unit
        quadratic = np.where(self.apart, self.products, 2 * chosen)
        within = self.basis[options, 1:]
        core = within.T @ quadratic @ within
        values, vectors = np.linalg.eigh(0.5 * (core + core.T))
        values = values - min(0.0, float(values.min(initial=0.0)))  # inside groups this changes no objective
        kept = values > 1e-13 * values.max(initial=0.0)
        factor = within @ (vectors * np.sqrt(np.maximum(values, 0.0)))[:, kept]
        # centring removes linear terms: the row and column means of every block
        moved = np.where(self.apart, self.products - factor @ factor.T, 0.0)
        sizes = np.diff(self.first)
        means = np.add.reduceat(moved, self.first[:-1], axis=1) / sizes
        middle = np.add.reduceat(means, self.first[:-1], axis=0) / sizes[:, None]
        cost = problem.cost + means.sum(axis=1) - middle.sum(axis=1)[problem.group_of]
        offset = problem.offset + 0.5 * float(middle.sum())
        return problem.derived(cost=cost, pairs=PairTerms(factor=factor), offset=offset)


def _interaction(products: Floats) -> Floats:
    """Return scales ``(V,)`` of the options: the fourth root of their largest product, normalised to about 1."""
    size = np.sqrt(np.abs(products).max(axis=1, initial=0.0))
    usual = float(np.quantile(size, 0.9)) or float(size.max()) or 1.0
    scales: Floats = np.sqrt(np.maximum(size / usual, SMALLEST_SCALE))
    return scales


def _positive_part(face: Floats, matrix: Floats) -> Floats:
    """Return the nearest positive semidefinite matrix on the face (whose columns are orthonormal)."""
    core = face.T @ matrix @ face
    values, vectors = np.linalg.eigh(0.5 * (core + core.T))  # LAPACK's routine for a subset of them sometimes fails
    positive = values > 0
    columns = face @ (vectors[:, positive] * np.sqrt(values[positive]))
    part: Floats = columns @ columns.T
    return part


@compiled
def _nearest_shares(wanted: Floats, weight: Floats, first: Integers) -> Floats:
    """Return, in every group, the shares ≥ 0 with sum 1 that are nearest to ``wanted`` in weighted least squares."""
    share = np.empty(len(wanted))
    for group in range(len(first) - 1):
        begin, end = first[group], first[group + 1]
        height = weight[begin:end] * wanted[begin:end]
        total, inverse, level = -1.0, 0.0, 0.0
        order = np.argsort(-height)
        for i in range(len(order)):
            v = begin + order[i]
            if i and level >= height[order[i]]:
                break
            total += wanted[v]
            inverse += 1.0 / weight[v]
            level = total / inverse
        for v in range(begin, end):
            share[v] = max(0.0, wanted[v] - level / weight[v])
    return share
