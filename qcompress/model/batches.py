"""Split a batch into samples, refuse one without any, and copy it for a pass."""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompress.errors import DataError


def require_samples(batch: Any, name: str = "a batch") -> None:
    """Check that some tensor of a batch called ``name`` holds a number.

    Batches without tensors, or with something else that may hold samples, such as texts, are not checked.

    Raises:
        DataError: all of them are empty.

    >>> require_samples({"x": torch.ones(0, 4), "y": torch.ones(0)}, "data[1]")
    Traceback (most recent call last):
    qcompress.errors.DataError: data[1] holds no sample (tensors of shape (0, 4), (0,)): leave it out
    """
    tensors = _tensors(batch)
    if tensors and not any(tensor.numel() for tensor in tensors) and not _holds_others(batch):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise DataError(f"{name} holds no sample (tensors of shape {shapes}): leave it out")


def own(batch: Any, *, tensors: bool = True) -> Any:
    """Return a copy of a batch, which a forward pass may take entries out of or write to.

    Mappings, lists, tuples and dataclasses are copied and, with ``tensors``, the tensors and NumPy arrays in them;
    anything else is the same.

    >>> batch = {"x": torch.ones(1), "labels": torch.zeros(1)}
    >>> _ = own(batch).pop("labels"), own(batch)["x"].add_(1)
    >>> batch
    {'x': tensor([1.]), 'labels': tensor([0.])}
    """
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_(batch.requires_grad) if tensors else batch
    if isinstance(batch, np.ndarray):
        return batch.copy() if tensors else batch
    if isinstance(batch, tuple):
        items = [own(item, tensors=tensors) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else tuple(items)
    if isinstance(batch, MutableMapping):
        copied = copy.copy(batch)
        for key, item in batch.items():
            copied[key] = own(item, tensors=tensors)
        return copied
    if isinstance(batch, list):
        changed = copy.copy(batch)
        changed[:] = [own(item, tensors=tensors) for item in batch]
        return changed
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        instance = copy.copy(batch)
        for item in dataclasses.fields(batch):
            if hasattr(batch, item.name):
                object.__setattr__(instance, item.name, own(getattr(batch, item.name), tensors=tensors))
        return instance
    return batch


def samples(batch: Any) -> Iterator[Any]:
    """Split a batch into samples, as batches of one; yields the batch itself if it cannot be split.

    Raises:
        DataError: there is no sample.

    >>> [sample["x"].tolist() for sample in samples({"x": torch.tensor([[1], [2]]), "flag": True})]
    [[[1]], [[2]]]
    """
    require_samples(batch)
    lengths = {len(value) for value in _tensors(batch)}
    if len(lengths) != 1:
        yield batch
        return
    for index in range(lengths.pop()):
        yield taken(batch, slice(index, index + 1))


def as_float32(batch: Any) -> Any:
    """Convert what is in half precision to float32; a batch or a part of it without any is returned itself.

    >>> as_float32({"x": torch.ones(1, dtype=torch.bfloat16), "ids": torch.ones(1, dtype=torch.int64)})
    {'x': tensor([1.]), 'ids': tensor([1])}
    """
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype in (torch.bfloat16, torch.float16) else batch
    if isinstance(batch, Mapping):
        entries = {key: as_float32(value) for key, value in batch.items()}
        return batch if all(entries[key] is value for key, value in batch.items()) else entries
    if isinstance(batch, (tuple, list)):
        items = [as_float32(value) for value in batch]
        if all(item is value for item, value in zip(items, batch, strict=True)):
            return batch
        return tuple(items) if isinstance(batch, tuple) else items
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.ndim else []
    values: Iterable[Any] = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return [tensor for value in values for tensor in _tensors(value)]


def _holds_others(batch: Any) -> bool:
    """Whether a batch holds more than tensors, numbers and None."""
    if isinstance(batch, Mapping):
        return any(map(_holds_others, batch.values()))
    if isinstance(batch, (tuple, list)):
        return any(map(_holds_others, batch))
    return not isinstance(batch, (Tensor, int, float, NoneType))


def taken(batch: Any, part: slice) -> Any:
    """Return some samples of a batch, which are the first dimension of each tensor in it."""
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided and not batch.is_nested:
            return batch.to_dense()[part].to_sparse(layout=batch.layout)
        return batch[part] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: taken(value, part) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [taken(value, part) for value in batch]
    return batch
