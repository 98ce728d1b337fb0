"""Triangle inequalities of sign matrices: of three signs, two are equal.

For ``X = s·sᵀ`` and three indices i > j > k, each of the four inequalities

    a·X_ij + b·X_ik + c·X_jk ≥ -1,   (a, b, c) = (1, 1, 1), (1, -1, -1), (-1, 1, -1) or (-1, -1, 1)

holds, but not for every positive semidefinite X with diagonal 1. The most violated ones are added as cuts (Helmberg &
Rendl, doi:10.1007/BF01582072).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers

SIGNS = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
"""The signs (a, b, c) of the four inequalities."""

MOST_VIOLATED = 40_000
"""Maximum number of violated inequalities among which the worst are looked for."""

RAISED = 1.1
"""Factor by which the least violation is raised above the median if there are more."""


@dataclass(frozen=True, slots=True, eq=False)
class Triangles:
    """Some triangle inequalities with their multipliers.

    Attributes:
        corner: ``(m, 3)`` indices i > j > k.
        kind: ``(m,)`` row of `SIGNS`.
        weight: ``(m,)`` multipliers ≥ 0.
    """

    corner: Integers
    kind: Integers
    weight: Floats

    @classmethod
    def none(cls) -> "Triangles":
        """Return an empty set."""
        return cls(np.zeros((0, 3), dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))

    def kept(self, flags: NDArray[np.bool_]) -> "Triangles":
        """Return those that are marked."""
        return Triangles(self.corner[flags], self.kind[flags], self.weight[flags])

    def with_violated(self, matrix: Floats, most: int, least: float) -> "Triangles":
        """Add the (at most ``most``) inequalities that ``matrix`` violates most, by at least ``least``."""
        corner, kind, violation = _violated(matrix, least)
        while len(corner) == MOST_VIOLATED:  # the list is full before all were seen
            worse = _violated(matrix, RAISED * float(np.median(violation)))
            if not len(worse[0]):
                break
            corner, kind, violation = worse
        new = ~np.isin(_key(corner, kind), _key(self.corner, self.kind))
        corner, kind, violation = corner[new], kind[new], violation[new]
        if len(corner) > most:
            worst = np.argpartition(-violation, most)[:most]
            corner, kind = corner[worst], kind[worst]
        return Triangles(
            np.concatenate([self.corner, corner]),
            np.concatenate([self.kind, kind]),
            np.concatenate([self.weight, np.zeros(len(corner))]),
        )

    def merged(self, place: Integers, sign: Integers) -> "Triangles":
        """State the inequalities for fewer signs; those that two of the remaining ones imply are left out.

        Args:
            place: for each former index, its new index; 0 if its sign is decided.
            sign: for each former index, its sign if it is decided (1 for index 0), else 1.
        """
        new, by = place[self.corner], sign[self.corner]
        kept = (new == 0).sum(axis=1) <= 1
        new, by, signs = new[kept], by[kept], SIGNS[self.kind[kept]]
        signs = signs * np.stack([by[:, 0] * by[:, 1], by[:, 0] * by[:, 2], by[:, 1] * by[:, 2]], axis=1)
        order = np.argsort(-new, axis=1)
        rows = np.arange(len(new))[:, None]
        # the sign of a pair is found by the corner that it leaves out
        opposite = signs[:, ::-1][rows, order][:, ::-1]
        kind = np.where(opposite[:, 0] > 0, np.where(opposite[:, 1] > 0, 0, 1), np.where(opposite[:, 1] > 0, 2, 3))
        return Triangles(new[rows, order], kind, self.weight[kept])


def warm_triangles() -> None:
    """Run every kernel once, so that all of them are compiled."""
    matrix = -np.ones((3, 3))
    cut = Triangles.none().with_violated(matrix, most=1, least=0.1)
    subtract(matrix, cut.corner, cut.kind, cut.weight, SIGNS)
    slacks(matrix, cut.corner, cut.kind, SIGNS)


def _key(corner: Integers, kind: Integers) -> Integers:
    key: Integers = (corner[:, 0] << 42) + (corner[:, 1] << 22) + (corner[:, 2] << 2) + kind
    return key


@compiled
def _violated(matrix: Floats, least: float) -> tuple[Integers, Integers, Floats]:
    """Return corners, kinds and violations of the inequalities that are violated by more than ``least``."""
    corner = np.empty((MOST_VIOLATED, 3), dtype=np.int64)
    kind = np.empty(MOST_VIOLATED, dtype=np.int64)
    violation = np.empty(MOST_VIOLATED)
    found = 0
    for i in range(len(matrix)):
        for j in range(i):
            a = matrix[i, j]
            for k in range(j):
                b, c = matrix[i, k], matrix[j, k]
                low = min(min(a + b + c, a - b - c), min(b - a - c, c - a - b))
                if -1.0 - low <= least or found == MOST_VIOLATED:
                    continue
                which = 3
                if a + b + c == low:
                    which = 0
                elif a - b - c == low:
                    which = 1
                elif b - a - c == low:
                    which = 2
                corner[found, 0], corner[found, 1], corner[found, 2] = i, j, k
                kind[found], violation[found] = which, -1.0 - low
                found += 1
    return corner[:found], kind[:found], violation[:found]


@compiled
def subtract(matrix: Floats, corner: Integers, kind: Integers, weight: Floats, signs: Floats) -> None:
    """Subtract every inequality's symmetric matrix times its multiplier, in place."""
    for m in range(len(weight)):
        i, j, k, half = corner[m, 0], corner[m, 1], corner[m, 2], 0.5 * weight[m]
        for row, column, sign in ((i, j, signs[kind[m], 0]), (i, k, signs[kind[m], 1]), (j, k, signs[kind[m], 2])):
            matrix[row, column] -= half * sign
            matrix[column, row] -= half * sign


@compiled
def slacks(matrix: Floats, corner: Integers, kind: Integers, signs: Floats) -> Floats:
    """Return by how much ``matrix`` fulfils every inequality (negative if it is violated)."""
    slack = np.empty(len(corner))
    for m in range(len(corner)):
        i, j, k = corner[m, 0], corner[m, 1], corner[m, 2]
        a, b, c = signs[kind[m], 0], signs[kind[m], 1], signs[kind[m], 2]
        slack[m] = 1.0 + a * matrix[i, j] + b * matrix[i, k] + c * matrix[j, k]
    return slack
