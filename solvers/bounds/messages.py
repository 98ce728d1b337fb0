"""Sparse pair terms as dense blocks between two groups, and message passing over them.

A message moves a part of a block's weights to the options of one of its groups: the group's costs rise, the block's
weights fall by the same amount, and no choice's objective changes. `pass_messages` updates the messages so that the
sum of all minima, a lower bound, never falls.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from formulations import Problem
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers

NEGLIGIBLE = 40.0
"""Softmin weights of values more than this many temperatures above the minimum are set to 0 (they are below 1e-17)."""


@dataclass(frozen=True, slots=True, eq=False)
class SparseBlocks:
    """The sparse pair terms as dense blocks between pairs of groups.

    Attributes:
        row: ``(B + 1, 3)`` for each block: start of its weights, start of its messages, number of its rows.
        weights: weights of all blocks, row by row.
        option: flat option of each message: for each block its rows, then its columns.
        group: ``(B, 2)`` for each block, the groups of its rows and of its columns.
        num_groups: number of groups of the problem.
    """

    row: Integers
    weights: Floats
    option: Integers
    group: Integers
    num_groups: int

    @property
    def arrays(self) -> tuple[Integers, Floats, Integers]:
        """The arrays ``row, weights, option``, in the order of the compiled functions' arguments."""
        return self.row, self.weights, self.option

    @property
    def incident(self) -> tuple[Integers, Integers]:
        """The blocks of every group for `pass_messages`: where each group's blocks start, and the blocks with sides."""
        both = np.column_stack([self.group[:, 0], self.group[:, 1]]).ravel()
        order = np.argsort(both, kind="stable")
        return np.concatenate([[0], np.cumsum(np.bincount(both, minlength=self.num_groups))]), order

    @property
    def num_messages(self) -> int:
        """Number of multipliers of the blocks."""
        return len(self.option)

    def each(self, messages: Floats) -> Iterator[tuple[Integers, Integers, Floats, Floats, Floats]]:
        """Yield row options, column options, weights (rows, columns), row and column messages of every block."""
        for (weight, message, rows), (weight_end, end, _) in itertools.pairwise(self.row.tolist()):
            middle = message + rows
            weights = self.weights[weight:weight_end].reshape(rows, end - middle)
            upper, lower = slice(message, middle), slice(middle, end)
            yield self.option[upper], self.option[lower], weights, messages[upper], messages[lower]

    @classmethod
    def of(cls, problem: Problem) -> "SparseBlocks":
        """Build the blocks of a problem."""
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


@compiled
def decode(
    first: Integers,
    cost: Floats,
    row: Integers,
    weights: Floats,
    group_pair: Integers,
    start: Integers,
    incident: Integers,
    messages: Floats,
) -> Integers:
    """Choose, group after group, the local option with the smallest cost given the choices in previous groups."""
    groups = len(first) - 1
    choice = np.zeros(groups, np.int64)
    for group in range(groups):
        reduced = cost[first[group] : first[group + 1]].copy()
        for place in range(start[group], start[group + 1]):
            if incident[place] % 2:  # the group has the columns, so the rows belong to a previous group
                block = incident[place] // 2
                weight, message, rows = row[block]
                columns = row[block + 1, 1] - message - rows
                chosen = choice[group_pair[block, 0]]
                for j in range(columns):
                    reduced[j] += weights[weight + chosen * columns + j] - messages[message + rows + j]
        choice[group] = np.argmin(reduced)
    return choice


@compiled
def pass_messages(
    first: Integers,
    cost: Floats,
    row: Integers,
    weights: Floats,
    start: Integers,
    incident: Integers,
    messages: Floats,
    sweeps: int,
) -> None:
    """Pass sequential reweighted messages in place (doi:10.1109/TPAMI.2006.200); a sweep never lowers the bound.

    Each sweep goes forward and backward over the groups. A group distributes its cost over its blocks ahead, and each
    of these blocks passes its minima to its other group. ``incident[start[g]:start[g + 1]]`` are the blocks of group g,
    as ``2·block`` if g has its rows and ``2·block + 1`` if g has its columns.
    """
    groups = len(first) - 1
    for turn in range(2 * sweeps):
        side = turn % 2  # forward: blocks in which the group has the rows
        for step in range(groups):
            group = step if side == 0 else groups - 1 - step
            begin, end = start[group], start[group + 1]
            ahead = 0
            for place in range(begin, end):
                ahead += incident[place] % 2 == side
            if ahead == 0:
                continue
            share = 1.0 / max(ahead, end - begin - ahead)
            reduced = cost[first[group] : first[group + 1]].copy()
            for place in range(begin, end):
                block = incident[place] // 2
                sent = row[block, 1] + (row[block, 2] if incident[place] % 2 else 0)
                reduced += messages[sent : sent + len(reduced)]
            for place in range(begin, end):
                if incident[place] % 2 != side:
                    continue
                block = incident[place] // 2
                weight, message, rows = row[block]
                columns = row[block + 1, 1] - message - rows
                sent, answered = (message, message + rows) if side == 0 else (message + rows, message)
                messages[sent : sent + len(reduced)] -= share * reduced
                for j in range(columns if side == 0 else rows):
                    least = np.inf
                    for i in range(len(reduced)):
                        entry = weight + (i * columns + j if side == 0 else j * columns + i)
                        least = min(least, weights[entry] - messages[sent + i])
                    messages[answered + j] = least


@compiled
def block_minima(
    row: Integers, weights: Floats, messages: Floats, temperature: float, marginals: Floats
) -> tuple[float, float]:
    """Sum min and softmin over the blocks; ``marginals`` is set to the softmin's row and column sums.

    At temperature 0 only the minima are computed.
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
