"""Passes over batches that are not in a list: whether they can be read again, and how many there are."""

from collections.abc import Iterable, Iterator
from typing import Any

from qcompress.errors import DataError


class Passes:
    """Batches that are read more than once, without a length of their own.

    Args:
        batches: what gives them, anew for every pass.
        name: name of the data in the error.

    >>> import torch
    >>> batches = Passes(map(torch.ones, range(2)), "data")
    >>> len(list(batches))
    2
    >>> list(batches)
    Traceback (most recent call last):
    qcompress.errors.DataError: data can be read only once (the second pass yields nothing), ...
    """

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        self.batches, self._name, self._seen = batches, name, False

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of a pass.

        Raises:
            DataError: there are none, though an earlier pass yielded some.
        """
        number = 0
        for number, batch in enumerate(self.batches, 1):  # noqa: B007
            self._seen = True
            yield batch
        if not number and self._seen:
            raise DataError(
                f"{self._name} can be read only once (the second pass yields nothing), and is read several times: pass "
                "a list or a DataLoader"
            )


def number_of(data: Iterable[Any]) -> int | None:
    """Return the number of batches of the data, or None if it is not known before they have been read.

    A DataLoader over an IterableDataset has a length only if the data set has one, and some raise NotImplementedError.

    >>> import torch
    >>> number_of([torch.ones(1, 4)]), number_of(iter([torch.ones(1, 4)]))
    (1, None)
    """
    try:
        return len(data.batches if isinstance(data, Passes) else data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None
