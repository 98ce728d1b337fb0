"""Passes over batches that are not in a list: whether they can be read again, their order and their number."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from qcompress.errors import DataError


class Passes:
    """Batches that are read more than once, without a length of their own.

    A generator that a DataLoader or its sampler has of its own is seeded from torch's in every pass, and restored:
    torch's is seeded by every step (`qcompress.model.modes.seeded`), so that a repeated step sees the same order.

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
        with _seeded_by_torch(_generators_of(self.batches)):
            for number, batch in enumerate(self.batches, 1):  # noqa: B007
                self._seen = True
                yield batch
        if not number and self._seen:
            raise DataError(
                f"{self._name} can be read only once (the second pass yields nothing), and is read several times: pass "
                "a list or a DataLoader"
            )


def _generators_of(batches: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, other than torch's own."""
    sampler = getattr(batches, "batch_sampler", None)
    holders = (batches, getattr(batches, "sampler", None), sampler, getattr(sampler, "sampler", None))
    found = {id(own): own for own in (getattr(holder, "generator", None) for holder in holders)}
    return [own for own in found.values() if isinstance(own, torch.Generator) and own is not torch.default_generator]


@contextlib.contextmanager
def _seeded_by_torch(generators: list[torch.Generator]) -> Iterator[None]:
    before = [own.get_state() for own in generators]
    for own in generators:
        own.manual_seed(int(torch.randint(2**63 - 1, ())))
    try:
        yield
    finally:
        for own, state in zip(generators, before, strict=True):
            own.set_state(state)


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
