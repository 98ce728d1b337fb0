"""Follow a model's channels through one run: which operation reads, mixes or moves which of them.

Every tensor of the run carries the node (`qcompress.structure.nodes`) that each of its numbers belongs to. What moves
numbers is done to the nodes as well; what combines two numbers joins their nodes; a product with a weight ends one
channel and begins another. This takes no graph of the model: what ran is what was seen, whatever the code looks like.

What always holds: an operation that is not known blocks the channels that it reads. They are named and stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompress.model.tensors import Held
from qcompress.structure.nodes import Nodes, NodeSet

aten = torch.ops.aten


@dataclass(slots=True)
class Seen:
    """What is known of a tensor of the run.

    Attributes:
        tensor: itself, so that it lives on and its identity stays its own.
        labels: of its shape, the node of every number, 0 for none; None when it has none.
        source: the parameter or buffer that its numbers are, as far as they are one's.
        places: of its shape each, for every dimension of ``source`` the index there.
    """

    tensor: Tensor
    labels: Tensor | None = None
    source: str = ""
    places: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Nodes that must be the same along some dimensions, or be blocked."""

    labels: Tensor
    dims: tuple[int, ...]
    mask: Tensor | None
    reason: str


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a run.

    Attributes:
        nodes: joined and blocked as the run goes; `qcompress.structure.constraints.settle` does the rest after it.
        constants: what has to be the same along dimensions.
        pieces: (id of a tensor, dimension) → its nodes and the pieces that were taken, first index and length.
        splits: nodes of a tensor, and the dimensions that one dimension became.
        reads: (parameter, dimension) that a product reads channels by.
        work: nodes of the outputs of products of activations, and multiply-accumulates for each number of these.
    """

    def __init__(self, nodes: NodeSet, held: Sequence[Held], rule_of: "Callable[[Any], Rule | None]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes, self._rule_of = nodes, rule_of
        self.constants: list[Constant] = []
        self.pieces: dict[tuple[int, int], tuple[Tensor, set[tuple[int, int, int]]]] = {}
        self.splits: list[tuple[Tensor, tuple[int, ...]]] = []
        self.reads: set[tuple[str, int]] = set()
        self.work: list[tuple[Tensor, float]] = []
        self._seen: dict[int, Seen] = {}
        for item in held:
            if id(item.tensor) in self._seen or not item.tensor.ndim:  # of two names of one tensor the first counts
                continue
            shape = item.tensor.shape
            places = tuple(
                torch.arange(size).view(*[1] * dim, size, *[1] * (len(shape) - dim - 1)).expand(shape)
                for dim, size in enumerate(shape)
            )
            self._seen[id(item.tensor)] = Seen(item.tensor, None, item.name, places)

    def seen(self, tensor: Any) -> Seen | None:
        """What is known of a tensor, or None."""
        return self._seen.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def labels(self, tensor: Any) -> Tensor | None:
        """Its nodes, or None."""
        seen = self.seen(tensor)
        return None if seen is None else seen.labels

    def mark(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Note the nodes of a tensor."""
        if labels is not None:
            self._seen[id(tensor)] = Seen(tensor, compact(labels))

    def mark_source(self, tensor: Tensor, source: str, places: tuple[Tensor, ...]) -> None:
        """Note that a tensor's numbers are a parameter's."""
        self._seen[id(tensor)] = Seen(tensor, None, source, places)

    def block(self, value: Any, reason: str) -> None:
        """Block what a tensor carries, a parameter in all its dimensions."""
        seen = self.seen(value)
        if seen is None:
            return
        if seen.labels is not None:
            self.nodes.block(distinct(seen.labels), reason)
        for dim in range(len(seen.places)):
            self.nodes.block(self.nodes.of(seen.source, dim), reason)

    def constant(self, labels: Tensor, dims: Sequence[int], reason: str, mask: Tensor | None = None) -> None:
        """Ask for the same node along dimensions (see `Constant`)."""
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
        if any(self.seen(value) is not None for value in tree_leaves((args, kwargs))):
            if rule is None:
                for value in tree_leaves((args, kwargs)):
                    self.block(value, f"the operation {func._overloadpacket} is not followed")
            else:
                rule(self, func, args, kwargs, output)
        return output


Rule = Callable[[Tracer, Any, Sequence[Any], dict[str, Any], Any], None]


def compact(labels: Tensor) -> Tensor:
    """The same nodes, held once along every dimension that repeats them."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand(labels.shape)
    return labels


def compacted(labels: Tensor) -> Nodes:
    """The nodes without repetition along the dimensions that repeat them."""
    for dim, size in enumerate(labels.shape):
        if labels.stride(dim) == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return np.asarray(labels.numpy())


def distinct(labels: Tensor) -> Nodes:
    """Nodes in ``labels``, each once."""
    return np.unique(compacted(labels))
