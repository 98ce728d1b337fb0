"""The semidefinite bound of problems in signs, tightened by triangle inequalities.

With ``X = s·sᵀ``, the relaxation of `solvers.bounds.signs` is

    minimise <C, X>  over positive semidefinite X with diagonal 1 that meet the triangle inequalities,

and for all multipliers y (free, of the diagonal) and z ≥ 0 (of the inequalities), ``M = C - diag(y) - Σ z_m·A_m`` gives
the bound ``Σ y - Σ z + (G + 1)·λ_min(M)``, because X has the trace G + 1. Multipliers are found by L-BFGS, first on the
function with a penalty for the positive part of -M (Krislock, Malick & Roupin, doi:10.1145/3005345), and then on the
augmented Lagrangian around the latest X, whose bounds are as good as the relaxation itself. The inequalities that X
violates most are added after every few steps, and those with multiplier 0 are dropped.
"""

import time
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from formulations import Problem
from solvers.bounds.signs import SignForm
from solvers.bounds.triangles import SIGNS, Triangles, slacks, subtract
from solvers.kernels.moves import Floats, Integers

FIRST_PENALTY, PENALTY, COOLING = 0.3, 0.05, 0.5
"""Penalties in units of the root mean square of C: the first one, the augmented Lagrangian's, and their ratio."""

STEPS = 12
"""Number of L-BFGS steps between two looks at the inequalities, the bound and the clock."""

CUTS = 3
"""Number of inequalities, per sign, that are added at one time."""

LEAST_VIOLATION, LEAST_WEIGHT = 0.03, 1e-7
"""Violation from which an inequality is added, and multiplier (relative to the size of C) below which it is dropped."""

PATIENCE, STAGNATION, MAX_ROUNDS = 4, 0.08, 400
"""The method ends if this many rounds together close less than this fraction of the gap to the target."""

EIGENVALUE_ERROR = 1e-12
"""Relative error of an eigenvalue, which is subtracted from every bound."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SignState:
    """The multipliers and the matrix X at which the method ended, from which a similar problem may start."""

    diagonal: Floats
    triangles: Triangles
    center: Floats

    def restricted(self, open_groups: Integers, signs: Integers) -> "SignState":
        """State them for fewer open groups.

        Args:
            open_groups: the groups that stay open, ascending.
            signs: ``(G,)`` the sign of every group that is decided (any number for the others).
        """
        kept = np.concatenate([[0], open_groups + 1])
        place = np.zeros(len(self.diagonal), dtype=np.int64)
        place[kept] = np.arange(len(kept))
        sign = np.concatenate([[1], np.where(place[1:] == 0, signs, 1)])
        diagonal = self.diagonal[kept].copy()
        diagonal[0] += self.diagonal[place == 0].sum() - self.diagonal[0]
        return SignState(
            diagonal=diagonal, triangles=self.triangles.merged(place, sign), center=self.center[np.ix_(kept, kept)]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SignBound:
    """A proven lower bound from the relaxation in signs.

    Attributes:
        value: the bound; no choice has a smaller objective.
        at_least: ``(V,)`` bounds by option; no choice that takes option v has a smaller objective.
        share: ``(V,)`` value of each option in the relaxed solution; sums to 1 in every group.
        state: state to start from on a similar problem.
    """

    value: float
    at_least: Floats
    share: Floats
    state: SignState


def sign_bound(
    problem: Problem,
    *,
    target: float = np.inf,
    time_limit: float = np.inf,
    start: SignState | None = None,
) -> SignBound:
    """Compute a semidefinite bound with triangle inequalities; two options in every group, no budgets.

    Args:
        problem: the problem; an evaluation takes an eigenvalue decomposition with G + 1 rows.
        target: a sufficient bound (an incumbent's objective), at which the method ends.
        time_limit: maximum time in seconds; at least one round is always run.
        start: the state of a similar problem.

    >>> from formulations.generators.families import member
    >>> problem = member("random_max_cut", {"vertices": 8, "density": 0.5, "seed": 0})
    >>> bool(sign_bound(problem).value <= problem.evaluate([0, 1] * 4).objective)
    True
    """
    deadline = time.perf_counter() + time_limit
    form = SignForm.of(problem)
    ascent = _Ascent(form, start)
    bounds: list[float] = []
    while len(bounds) < MAX_ROUNDS:
        ascent.round()
        bounds.append(ascent.value)
        missing = min(target, ascent.limit) - ascent.value
        stuck = len(bounds) > PATIENCE and bounds[-1] - bounds[-1 - PATIENCE] <= STAGNATION * missing
        if ascent.value >= target or time.perf_counter() > deadline or (stuck and ascent.center is not None):
            break
    return ascent.result()


class _Ascent:
    """The multipliers, and the steps that improve them, in units of the root mean square of C."""

    def __init__(self, form: SignForm, start: SignState | None) -> None:
        self.size = len(form.matrix)
        self.unit = float(np.linalg.norm(form.matrix)) / self.size or 1.0
        self.cost, self.constant = form.matrix / self.unit, form.constant
        self.triangles, self.center, self.penalty = Triangles.none(), None, FIRST_PENALTY
        self.diagonal = np.full(self.size, np.linalg.eigvalsh(self.cost)[0])
        if start is not None:
            weights = start.triangles.weight / self.unit
            self.triangles = Triangles(start.triangles.corner, start.triangles.kind, weights)
            self.diagonal, self.center, self.penalty = start.diagonal / self.unit, start.center, PENALTY
        self.X = np.eye(self.size)
        self.value, self.limit, self.best = -np.inf, np.inf, (self.diagonal, self.triangles)
        self.least = 0.2 if start is None else LEAST_VIOLATION

    def _slack(self, diagonal: Floats, triangles: Triangles, weight: Floats) -> Floats:
        """Return M for these multipliers."""
        matrix: Floats = self.cost.copy()
        matrix[np.diag_indices(self.size)] -= diagonal
        subtract(matrix, triangles.corner, triangles.kind, weight, SIGNS)
        return matrix

    def _loss(self, point: Floats) -> tuple[float, Floats]:
        """Return the augmented Lagrangian's dual function at some multipliers and its gradient, both negated."""
        diagonal, weight = point[: self.size], point[self.size :]
        slack = self._slack(diagonal, self.triangles, weight)
        inner = -slack if self.center is None else self.penalty * self.center - slack
        values, vectors = scipy.linalg.eigh(inner, driver="evd", check_finite=False, overwrite_a=True)
        first = int(np.searchsorted(values, 0.0))
        columns = vectors[:, first:] * np.sqrt(values[first:])
        self.X = columns @ columns.T / self.penalty
        credit = -float(self.size**2) if self.center is None else float(np.vdot(self.center, self.center))
        height = diagonal.sum() - weight.sum() - np.square(values[first:]).sum() / (2 * self.penalty)
        missing = slacks(self.X, self.triangles.corner, self.triangles.kind, SIGNS)
        return -(height + 0.5 * self.penalty * credit), np.concatenate([np.diagonal(self.X) - 1.0, missing])

    def round(self) -> None:
        """Take some steps, compute the bound, and exchange inequalities."""
        size, triangles = self.size, self.triangles
        lowest = np.concatenate([np.full(size, -np.inf), np.zeros(len(triangles.weight))])
        found = scipy.optimize.minimize(
            self._loss,
            np.concatenate([self.diagonal, triangles.weight]),
            jac=True,
            method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(lowest, np.inf),
            options={"maxiter": STEPS, "maxfun": STEPS + 8, "ftol": 0.0, "gtol": 1e-9},
        )
        self.diagonal, weight = found.x[:size], found.x[size:]
        slack = self._slack(self.diagonal, triangles, weight)
        lowest_value = float(scipy.linalg.eigvalsh(slack, driver="evd", check_finite=False)[0])
        error = EIGENVALUE_ERROR * size * float(np.abs(slack).sum(axis=1).max())
        bound = self.diagonal.sum() - weight.sum() + size * (lowest_value - error)
        value = self.constant + self.unit * float(bound)
        triangles = Triangles(triangles.corner, triangles.kind, weight)
        if value > self.value:
            self.value, self.best = value, (self.diagonal + lowest_value - error, triangles)
        if self.center is not None or self.penalty <= PENALTY:
            self.center = self.X
        else:
            self.penalty = max(PENALTY, COOLING * self.penalty)
        used = triangles.kept(weight > LEAST_WEIGHT)
        self.triangles = used.with_violated(self.X, CUTS * size, self.least)
        self.limit = self.constant - self.unit * float(found.fun)
        self.least = max(LEAST_VIOLATION, 0.8 * self.least)

    def result(self) -> SignBound:
        """Return the best bound with what it implies for every option."""
        diagonal, triangles = self.best
        slack = self._slack(diagonal, triangles, triangles.weight)
        rises = self.unit * _rises(slack)
        corner = np.sqrt(np.maximum(np.diagonal(self.X), 1e-12))
        ones = 0.5 + 0.5 * np.clip(self.X[0, 1:] / (corner[0] * corner[1:]), -1.0, 1.0)
        weights = Triangles(triangles.corner, triangles.kind, self.unit * triangles.weight)
        return SignBound(
            value=self.value,
            at_least=self.value + rises.ravel(),
            share=np.column_stack([1.0 - ones, ones]).ravel(),
            state=SignState(diagonal=self.unit * self.best[0], triangles=weights, center=self.X),
        )


def _rises(slack: Floats) -> Floats:
    """Return ``(G, 2)`` how much ``s·M·s`` is at least if a sign is -1 or 1, for a positive semidefinite M.

    The other signs are relaxed to real numbers, which leaves the Schur complement of two rows of M.
    """
    size = len(slack)
    shift = 1e-9 * float(np.abs(slack).max())
    inverse = np.linalg.inv(slack + shift * np.eye(size))
    first, own, cross = inverse[0, 0], np.diagonal(inverse)[1:], inverse[0, 1:]
    determinant = np.maximum(first * own - cross**2, 1e-300)
    rises = np.stack([(first + own + 2 * cross), (first + own - 2 * cross)], axis=1) / determinant[:, None]
    safe: Floats = np.maximum(0.0, (1 - 1e-6) * rises - size * shift)
    return safe
