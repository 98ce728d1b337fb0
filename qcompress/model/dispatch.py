"""The base of modes that watch the operations of a model while it runs."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qcompress.model.tensors import Memory


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that PyTorch does not guard against its compiler.

    The guard imports the compiler on first use, which takes seconds of processor time in every process. None is needed:
    while models are watched here, compiled parts run as written (`qcompress.model.forward.evaluating`).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Reading(Watching):
    """Record which tensors in some memory any operation reads.

    Attributes:
        names: their names in the order of the first read.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory, self.names = memory, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and (name := self._memory.owner_of(value)) is not None:
                self.names[name] = None
        return func(*args, **(kwargs or {}))
