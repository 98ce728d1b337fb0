"""Every index of every dimension of a model's tensors as a node; nodes that go together are joined.

A node stands for "index i of dimension d of that parameter or buffer". 0 is no node.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qcompress.model.tensors import Held

Nodes = NDArray[np.int64]


class NodeSet:
    """Nodes of some tensors, joined and blocked as what uses them is seen."""

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
        """All nodes of a dimension."""
        start = self.starts[name, dim]
        return np.arange(start, start + self.sizes[name, dim])

    def join(self, first: Nodes, second: Nodes) -> None:
        """Let each node of ``first`` go with that of ``second`` at its place; pairs with no node (0) do not count."""
        first, second = np.broadcast_arrays(first, second)
        pairs = np.stack([first.ravel(), second.ravel()])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs > 0).all(axis=0)]
        if pairs.shape[1]:
            pairs = np.unique(pairs, axis=1)
            self._joined.append((pairs[0], pairs[1]))

    def join_all(self, nodes: Nodes) -> None:
        """All these go together."""
        nodes = np.unique(nodes[nodes > 0])
        if len(nodes) > 1:
            self.join(nodes[:-1], nodes[1:])

    def block(self, nodes: Nodes, reason: str) -> None:
        """None of these can be removed."""
        nodes = np.unique(nodes[nodes > 0])
        if len(nodes):
            self._blocked.append((nodes, reason))

    def roots(self) -> Nodes:
        """``(count,)``: equal numbers for nodes that are joined; 0 for no node alone."""
        first = np.concatenate([pair[0] for pair in self._joined] or [np.zeros(0, dtype=np.int64)])
        second = np.concatenate([pair[1] for pair in self._joined] or [np.zeros(0, dtype=np.int64)])
        graph = coo_array((np.ones(len(first)), (first, second)), shape=(self.count, self.count))
        components = connected_components(graph, directed=False)[1].astype(np.int64)
        least = np.full(components.max() + 1, self.count, dtype=np.int64)
        np.minimum.at(least, components, np.arange(self.count))
        return np.asarray(least[components])

    def reasons(self, roots: Nodes) -> dict[int, str]:
        """Root → why it is blocked, of all that are; the first reason that was found."""
        reasons: dict[int, str] = {}
        for nodes, reason in self._blocked:
            for root in np.unique(roots[nodes]).tolist():
                reasons.setdefault(root, reason)
        return reasons
