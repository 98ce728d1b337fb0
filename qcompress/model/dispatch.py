"""The base of modes that watch the operations of a model while it runs."""

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that PyTorch does not guard against its compiler.

    The guard imports the compiler on first use, which takes seconds of processor time in every process. None is needed:
    while models are watched here, compiled parts run as written (`qcompress.model.forward.evaluating`).
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
