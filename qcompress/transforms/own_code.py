"""The code of users' own transforms, on which stored results depend besides the transforms' values."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from qcompress.identity import Identity, identify
from qcompress.transforms.base import Offer


def code_of(offers: Iterable[Offer]) -> Identity:
    """Return the identity of the classes of offers and of the offers that they hold; their values do not count.

    >>> from qcompress import low_rank, prune_quantize
    >>> code_of(prune_quantize(bits=(2,)).offers) == code_of(prune_quantize(bits=(4,)).offers)
    True
    >>> code_of(prune_quantize().offers) == code_of(low_rank().offers)
    False
    """
    kinds: dict[type, None] = {}
    waiting: list[Any] = list(offers)
    while waiting:
        found = waiting.pop()
        if isinstance(found, tuple):
            waiting += found
        elif isinstance(found, Offer):
            kinds[type(found)] = None
            waiting += [getattr(found, field.name) for field in fields(found)]
    return identify(list(kinds), "options")
