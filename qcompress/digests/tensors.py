"""What goes into a digest of tensors and arrays: class, type of numbers, shape, values, hooks and attributes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.digests.hashing import Digest, Parts, is_of_library, of_items, of_named
from qcompress.digests.libraries import is_own


def of_tensor(digest: Digest, value: Tensor, name: str) -> Parts:
    """Put the values of a tensor, and yield its class, hooks and attributes."""
    attributes = {key: item for key, item in vars(value).items() if not is_of_library(key)}
    hooks = [
        hook for each in (value._backward_hooks, value._post_accumulate_grad_hooks) for hook in (each or {}).values()
    ]
    if (attributes or hooks) and not digest.is_new(value):  # it may hold itself
        digest.put("seen", digest.order_of(value))
        return
    yield type(value), name
    place = digest.place_of(value)
    if place is None:
        yield from of_values(digest, value, name)
    else:
        layout = (tuple(value.shape), value.stride(), value.storage_offset(), value.is_conj(), value.is_neg())
        digest.put("held", place, str(value.dtype), *layout)
    yield from of_items(digest, "hooks", hooks, name)
    yield from of_named(digest, attributes, name)


def of_values(digest: Digest, value: Tensor, name: str) -> Parts:
    """Put the values of a tensor; yield them where they are tensors themselves."""
    digest.put("tensor", str(value.dtype), tuple(value.shape))
    if value.is_nested:
        yield from of_items(digest, "nested", value.unbind(), name)
    elif value.layout == torch.sparse_coo:
        whole = value.coalesce()
        yield from of_items(digest, "sparse", (whole.indices(), whole.values()), name)
    elif value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        digest.cannot_check(value, name)
    else:
        try:
            flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            digest.update(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data)
        except (NotImplementedError, RuntimeError):  # a tensor of another library
            digest.cannot_check(value, name)


def of_array(digest: Digest, value: NDArray[Any], name: str) -> Parts:
    """Put the values of an array of numpy, or yield them where they are objects."""
    yield type(value), name
    yield value.dtype, name
    digest.put("array", value.shape)
    if value.dtype.hasobject:
        yield from of_items(digest, "objects", value.ravel().tolist(), name)
    else:
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    yield from of_named(digest, vars(value) if is_own(type(value)) else {}, name)
