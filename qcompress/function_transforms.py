"""Tensors inside function transforms: what a layer is given under ``torch.func.vmap``, ``grad`` or ``jvp``.

Inside a transform, a tensor is a wrapper that hides the samples, and everything computed from it or written to other
tensors counts as a part of the transformed function. Therefore it is inspected unwrapped, outside of all transforms.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def in_transform() -> bool:
    """Whether the caller runs inside a function transform."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def outside_transforms(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Leave all function transforms inside the block; yield the tensors' values, mapped dimensions first.

    >>> seen = []
    >>> def look(row):
    ...     with outside_transforms(row) as (rows,):
    ...         seen.append(rows.tolist())
    ...     return row
    >>> _ = torch.func.vmap(look)(torch.tensor([[1.0], [2.0]]))
    >>> seen
    [[[1.0], [2.0]]]
    """
    if not in_transform():
        yield tensors
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # here: imported by transforms only

    with temporarily_clear_interpreter_stack():
        yield tuple(map(_unwrapped, tensors))


def _unwrapped(tensor: Tensor) -> Tensor:
    functions = torch._C._functorch
    if not functions.is_functorch_wrapped_tensor(tensor):
        return tensor
    inner = _unwrapped(functions.get_unwrapped(tensor))
    if not functions.is_batchedtensor(tensor):
        return inner
    outer = inner.ndim - functions.get_unwrapped(tensor).ndim  # dimensions mapped by transforms further out
    return inner.movedim(outer + functions.maybe_get_bdim(tensor), 0)
