"""Trace a model's channels through one run: which operation reads, mixes or moves which channels.

Every tensor of the run carries the node (`qcompress.structure.nodes`) of each of its values. An operation that moves
values moves their nodes as well; one that combines two values joins their nodes; a product with a weight ends one
channel and begins another. No graph of the model is needed: the operations that ran are observed, however the code is
written.

Invariant: an unknown operation blocks the channels it reads. They are reported and stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qcompress.model.counting import multiplies
from qcompress.model.dispatch import Watching
from qcompress.model.tensors import Held
from qcompress.structure.nodes import Nodes, NodeSet

aten = torch.ops.aten


@dataclass(slots=True)
class TracedTensor:
    """What is known about a tensor of the run.

    Attributes:
        tensor: the tensor itself, kept alive so that its id stays unique.
        labels: the node of every value (0 for none), of the tensor's shape; None if it has no nodes.
        source: the parameter or buffer that its values come from, if all come from one.
        places: for every dimension of ``source`` a tensor of this shape with the index of each value there.
    """

    tensor: Tensor
    labels: Tensor | None = None
    source: str = ""
    places: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Nodes that must be equal along some dimensions, or else are blocked."""

    labels: Tensor
    dims: tuple[int, ...]
    mask: Tensor | None
    reason: str


class Tracer(Watching):
    """A dispatch mode that traces a run.

    Attributes:
        nodes: nodes, joined and blocked during the run; `qcompress.structure.constraints.settle` finishes after it.
        constants: labels that must be constant along dimensions.
        pieces: (id of a tensor, dimension) → its nodes and the pieces taken from it (first index, length, step).
        splits: nodes of a tensor, and the dimensions that one dimension was split into.
        shared: nodes of a tensor, and those of a parameter that is combined with each of several parts of it, such as
            the heads.
        reads: (parameter, dimension) along which a product reads channels.
        work: nodes of the outputs of products whose multiply-accumulates depend on them, multiply-accumulates for each
            output value, and the name of the parameter that is multiplied with, empty for products of activations.
    """

    def __init__(self, nodes: NodeSet, held: Sequence[Held], rule_of: "Callable[[Any], Rule | None]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes, self._rule_of = nodes, rule_of
        self.constants: list[Constant] = []
        self.pieces: dict[tuple[int, int], tuple[Tensor, set[tuple[int, int, int]]]] = {}
        self.splits: list[tuple[Tensor, tuple[int, ...]]] = []
        self.shared: list[tuple[Tensor, Tensor]] = []
        self.reads: set[tuple[str, int]] = set()
        self.work: list[tuple[Tensor, float, str]] = []
        self._seen: dict[int, TracedTensor] = {}
        for item in held:
            if id(item.tensor) in self._seen or not item.tensor.ndim:  # of two names of one tensor the first counts
                continue
            shape = item.tensor.shape
            places = tuple(
                torch.arange(size).view(*[1] * dim, size, *[1] * (len(shape) - dim - 1)).expand(shape)
                for dim, size in enumerate(shape)
            )
            self._seen[id(item.tensor)] = TracedTensor(item.tensor, None, item.name, places)

    def seen(self, tensor: Any) -> TracedTensor | None:
        """Return what is known about a tensor, or None."""
        return self._seen.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def labels(self, tensor: Any) -> Tensor | None:
        """Return its nodes, or None."""
        seen = self.seen(tensor)
        return None if seen is None else seen.labels

    def mark(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Record the nodes of a tensor."""
        if labels is not None:
            self._seen[id(tensor)] = TracedTensor(tensor, compact(labels))

    def mark_source(self, tensor: Tensor, source: str, places: tuple[Tensor, ...]) -> None:
        """Record that the values of a tensor are those of a parameter."""
        self._seen[id(tensor)] = TracedTensor(tensor, None, source, places)

    def block(self, value: Any, reason: str) -> None:
        """Block the nodes of a tensor; of a parameter, those of all its dimensions."""
        seen = self.seen(value)
        if seen is None:
            return
        if seen.labels is not None:
            self.nodes.block(distinct(seen.labels), reason)
        for dim in range(len(seen.places)):
            self.nodes.block(self.nodes.of(seen.source, dim), reason)

    def constant(self, labels: Tensor, dims: Sequence[int], reason: str, mask: Tensor | None = None) -> None:
        """Require equal nodes along dimensions (see `Constant`)."""
        dims = tuple(dim for dim in dims if labels.shape[dim] > 1 and labels.stride(dim) != 0)
        if dims:
            self.constants.append(Constant(labels=labels, dims=dims, mask=mask, reason=reason))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = self._rule_of(func)
        if rule is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        product = rule is not None and multiplies(
            func._overloadpacket
        )  # also of values that are not channels: its work
        if product or any(self.seen(value) is not None for value in tree_leaves((args, kwargs))):
            try:
                if rule is not None:
                    rule(self, func, args, kwargs, output)
            except RuntimeError:  # shapes that do not fit: torch.func.vmap, for example, inserts dimensions
                rule = None
            if rule is None:
                for value in tree_leaves((args, kwargs)):
                    self.block(value, f"the operation {func._overloadpacket} is not supported")
        return output


Rule = Callable[[Tracer, Any, Sequence[Any], dict[str, Any], Any], None]


def compact(labels: Tensor) -> Tensor:
    """Return the same labels with stride 0 along every dimension that repeats them."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand(labels.shape)
    return labels


def compacted(labels: Tensor, *, whole: int | None = None) -> Nodes:
    """Return the labels without repetition along dimensions of stride 0, except along the dimension ``whole``."""
    for dim, size in enumerate(labels.shape):
        if dim != whole and labels.stride(dim) == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return np.asarray(labels.numpy())


def distinct(labels: Tensor) -> Nodes:
    """Return the distinct nodes in ``labels``."""
    return np.unique(compacted(labels))


def split_dims(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the dimensions of ``after`` that result from splitting fewer dimensions of ``before``.

    >>> split_dims((2, 12), (2, 3, 4)), split_dims((6, 4), (2, 3, 4)), split_dims((2, 3, 4), (2, 12))
    ([(1, 2)], [(0, 1)], [])
    """
    pieces, i, j = [], 0, 0
    while i < len(before) and j < len(after):
        first, start, old, new = j, i, before[i], after[j]
        while old != new:
            if old < new:
                i += 1
                old *= before[i]
            else:
                j += 1
                new *= after[j]
        dims = tuple(dim for dim in range(first, j + 1) if after[dim] > 1)
        if len(dims) > 1 and sum(size > 1 for size in before[start : i + 1]) < len(dims):
            pieces.append(dims)
        i, j = i + 1, j + 1
    return pieces
