"""Split a batch into samples."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def samples(batch: Any) -> Iterator[Any]:
    """Split a batch into samples, as batches of one; yields the batch itself if it cannot be split.

    >>> [sample["x"].tolist() for sample in samples({"x": torch.tensor([[1], [2]]), "flag": True})]
    [[[1]], [[2]]]
    """
    lengths = {len(value) for value in _tensors(batch)}
    if len(lengths) != 1:
        yield batch
        return
    for index in range(lengths.pop()):
        yield _taken(batch, slice(index, index + 1))


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.ndim else []
    values: Iterable[Any] = (
        batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return [tensor for value in values for tensor in _tensors(value)]


def _taken(batch: Any, part: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim else batch
    if isinstance(batch, dict):
        return {key: _taken(value, part) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_taken(value, part) for value in batch]
    return batch
