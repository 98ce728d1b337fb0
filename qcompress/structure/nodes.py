"""Every index of every dimension of a model's tensors as a node; nodes that must be removed together are joined.

A node stands for "index i of dimension d of this parameter or buffer". The number 0 stands for no node.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qcompress.model.tensors import Held

Nodes = NDArray[np.int64]


class NodeSet:
    """The nodes of some tensors, joined and blocked while their uses are traced."""

    def __init__(self, held: Sequence[Held]) -> None:
        self.starts: dict[tuple[str, int], int] = {}
        self.sizes: dict[tuple[str, int], int] = {}
        self.count = 1
        for item in held:
            for dim, size in enumerate(item.tensor.shape):
                self.starts[item.name, dim], self.sizes[item.name, dim] = self.count, size
                self.count += size
        self._joined: list[tuple[Nodes, Nodes]] = []
        self._blocked: list[tuple[Nodes, str]] = []

    def of(self, name: str, dim: int) -> Nodes:
        """Return all nodes of a dimension."""
        start = self.starts[name, dim]
        return np.arange(start, start + self.sizes[name, dim])

    def join(self, first: Nodes, second: Nodes) -> None:
        """Join each node of ``first`` with the one at the same position in ``second``; pairs with a 0 are ignored."""
        first, second = np.broadcast_arrays(first, second)
        pairs = np.stack([first.ravel(), second.ravel()])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs > 0).all(axis=0)]
        if pairs.shape[1]:
            first, second = np.divmod(np.unique(pairs[0] * self.count + pairs[1]), self.count)  # fast as one number
            self._joined.append((first, second))

    def join_all(self, nodes: Nodes) -> None:
        """Join all these nodes with one another."""
        nodes = np.unique(nodes[nodes > 0])
        if len(nodes) > 1:
            self.join(nodes[:-1], nodes[1:])

    def block(self, nodes: Nodes, reason: str) -> None:
        """Mark these nodes as not removable."""
        nodes = np.unique(nodes[nodes > 0])
        if len(nodes):
            self._blocked.append((nodes, reason))

    def roots(self) -> Nodes:
        """Return ``(count,)`` root numbers, equal for joined nodes; the number 0 (no node) is its own root."""
        first = np.concatenate([pair[0] for pair in self._joined] or [np.zeros(0, dtype=np.int64)])
        second = np.concatenate([pair[1] for pair in self._joined] or [np.zeros(0, dtype=np.int64)])
        graph = coo_array((np.ones(len(first)), (first, second)), shape=(self.count, self.count))
        components = connected_components(graph, directed=False)[1].astype(np.int64)
        least = np.full(components.max() + 1, self.count, dtype=np.int64)
        np.minimum.at(least, components, np.arange(self.count))
        return np.asarray(least[components])

    def reasons(self, roots: Nodes) -> dict[int, str]:
        """Map each blocked root to the first reason found."""
        reasons: dict[int, str] = {}
        for nodes, reason in self._blocked:
            for root in np.unique(roots[nodes]).tolist():
                reasons.setdefault(root, reason)
        return reasons
