"""Apply, after the traced run, the constraints that the code puts on shapes: they join nodes or block them."""

import numpy as np
from torch import Tensor

from qcompress.structure.nodes import Nodes
from qcompress.structure.products import varies
from qcompress.structure.tracing import Tracer, compacted, distinct

MAX_ROUNDS = 10

AT_FIXED_PLACES = "split at hard-coded positions"
SHARED = "shared by units that can be removed"


def settle(tracer: Tracer) -> tuple[Nodes, dict[int, str]]:
    """Return the root of every node, and for each blocked root the reason."""
    nodes = tracer.nodes
    roots = nodes.roots()
    for _ in range(MAX_ROUNDS):
        for labels, dims in tracer.splits:
            _keep_grid(tracer, labels, dims, roots)
        for (_, dim), (labels, pieces) in tracer.pieces.items():
            _keep_pieces(tracer, labels, dim, sorted(pieces), roots)
        before, roots = roots, nodes.roots()
        if np.array_equal(before, roots):  # what can be removed together is known now, but for shared parameters
            for labels, parameter in tracer.shared:
                _keep_shared(tracer, labels, parameter, roots)
            roots = nodes.roots()
            if np.array_equal(before, roots):
                break
    for item in tracer.constants:
        for dim in item.dims:
            item_roots = roots[compacted(item.labels)]
            if (item_roots != np.take(item_roots, [0], axis=dim)).any():
                labels = item.labels if item.mask is None else item.labels[item.mask]
                nodes.block(distinct(labels), item.reason)
                break
    return roots, nodes.reasons(roots)


def _keep_grid(tracer: Tracer, labels: Tensor, dims: tuple[int, ...], roots: Nodes) -> None:
    """Join along all but the last of the dimensions that one was split into: removal must follow one of them."""
    item_roots = roots[compacted(labels)]
    along = [dim for dim in dims if (item_roots != np.take(item_roots, [0], axis=dim)).any()]
    for dim in along[:-1]:
        tracer.nodes.join(item_roots, np.take(item_roots, [0], axis=dim))


def _keep_shared(tracer: Tracer, labels: Tensor, parameter: Tensor, roots: Nodes) -> None:
    """Let a parameter that several parts share stay whole if whole parts go, and follow what all parts lose."""
    item_roots = roots[compacted(labels)]
    along = [dim for dim in range(parameter.ndim) if varies(parameter, dim)]
    if any((item_roots != np.take(item_roots, [0], axis=dim)).any() for dim in along):
        tracer.nodes.join(compacted(labels), compacted(parameter))
    else:
        tracer.nodes.block(distinct(parameter), SHARED)


def _keep_pieces(tracer: Tracer, labels: Tensor, dim: int, pieces: list[tuple[int, int, int]], roots: Nodes) -> None:
    """Let equal pieces that cover a dimension lose the same positions; otherwise nothing may be removed."""
    whole = compacted(labels)
    whole_roots = roots[whole]
    if not (whole_roots != np.take(whole_roots, [0], axis=dim)).any():
        return
    size, length = labels.shape[dim], pieces[0][1]
    starts = [start for start, _, _ in pieces]
    if pieces == [(start, length, 1) for start in range(0, size, length)]:
        first = np.take(whole, range(length), axis=dim)
        for start in starts[1:]:
            tracer.nodes.join(np.take(whole, range(start, start + length), axis=dim), first)
    else:
        tracer.nodes.block(distinct(labels), AT_FIXED_PLACES)
