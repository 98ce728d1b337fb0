"""Find where a model selects the largest of computed numbers: experts by a router, the k largest activations, codes.

Such a decision is discrete: the outputs jump where it changes, so no derivative shows what a change of a weight costs.
It is found by its operations: one that returns indices of large or small numbers, which are used afterwards. A maximum
whose value alone is used, as in pooling, does not count.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
SELECTING = (
    aten.topk, aten.sort, aten.argmax, aten.argmin, aten.max, aten.min, aten.kthvalue, aten.median, aten.mode,
    aten.multinomial,
)  # fmt: skip


class Selections:
    """The modules of a model that select while it runs.

    Attributes:
        paths: their paths, in the order of the run.

    >>> found = Selections()
    >>> scores = torch.tensor([0.1, 0.7, 0.2])
    >>> for operation in (aten.topk.default, aten.sort.default):
    ...     values, places = operation(scores, 2) if operation is aten.topk.default else operation(scores)
    ...     found.see(operation, (scores,), (values, places))
    >>> found.paths  # nothing was done with the places yet
    []
    >>> found.see(aten.index_select.default, (scores, 0, places), scores[places])
    >>> found.paths
    ['']
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._running = [""]
        self._places: Any = WeakIdKeyDictionary()  # places of large numbers → path of the module that found them

    def follow(self, path: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Yield hooks that note when a module runs."""
        yield module.register_forward_pre_hook(lambda *_: self._running.append(path))
        yield module.register_forward_hook(lambda *_: self._left(), always_call=True)

    def see(self, func: Any, args: Any, output: Any) -> None:
        """Look at an operation and what it returned."""
        if len(self._places):
            for value in tree_leaves(args):
                path = self._places.get(value) if isinstance(value, Tensor) else None
                if path is not None and path not in self.paths:
                    self.paths.append(path)
        if func._overloadpacket in SELECTING and isinstance(args[0], Tensor) and args[0].is_floating_point():
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.dtype == torch.long:
                    self._places[value] = self._running[-1]

    def _left(self) -> None:
        self._running.pop()
