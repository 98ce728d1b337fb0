"""Digests of values: equal across processes for equal values, with a list of everything that could not be inspected.

An interrupted run resumes only if nothing that it depends on has changed. Numbers, tensors, containers, models,
functions and plain objects are inspected with all that they hold. Code of the user counts by its instructions,
constants, defaults, closure, and the globals and attributes of modules that it names; a module that code may take
anything from counts with all that it holds. Code of Python counts by its version, that of installed packages by the
list of files that they were installed with.

What passes change, such as counters and stored activations, counts as it is: identities are taken before the first
pass. What cannot be inspected (a lock, an open file, what is found with ``eval``, ``open`` or ``environ``) is listed in
`Identity.unchecked`, so that the caller can warn. So are several objects of one class in a set, which has no order that
is the same in every process. What an object hides from `pickle`, and what was registered within a library, is not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompress.digests.hashing import Digest
from qcompress.digests.models import of_layers
from qcompress.digests.walk import add

_FOUND: ContextVar[dict[tuple[Hashable, ...], tuple[Any, "Identity"]] | None] = ContextVar("found", default=None)


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a value.

    Attributes:
        digest: SHA-256 in hexadecimal digits, equal for equal values in every process.
        unchecked: items identified by their type alone, for example ``"forward.closure.log: TextIOWrapper"``.
    """

    digest: str
    unchecked: tuple[str, ...] = ()


def identify(value: Any, name: str = "value") -> Identity:
    """Return the identity of a value.

    Args:
        value: any value; an `Identity` is returned unchanged.
        name: name of the value in `Identity.unchecked`.

    >>> def scaled_by(factor):
    ...     return lambda model, batch: model(batch) * factor
    >>> identify(scaled_by(2)) == identify(scaled_by(2)) != identify(scaled_by(3))
    True
    >>> import threading
    >>> identify({"lock": threading.Lock()}, "state").unchecked
    ('state.lock: lock',)
    """
    if isinstance(value, Identity):
        return value
    digest = Digest()
    add(digest, [(value, name)])
    return Identity(digest.hexdigest(), tuple(digest.unchecked))


@contextlib.contextmanager
def identified_once() -> Iterator[None]:
    """Work out identities by `once` only once for each object in the ``with`` block.

    So a run is known by what it began with, whatever a loss keeps of its passes, and large values are read once.
    """
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def once(value: Any, *more: Hashable, find: Callable[[], Identity]) -> Identity:
    """Return the identity of an object, found before or by ``find()``; ``more`` is what else it depends on.

    >>> steps = []
    >>> with identified_once():
    ...     before = once(steps, find=lambda: identify(steps))
    ...     steps.append(1)
    ...     before == once(steps, find=lambda: identify(steps))
    True
    """
    found = _FOUND.get()
    if found is None:
        return find()
    key = (id(value), *more)
    if key not in found:
        identity = find()
        if isinstance(value, nn.Module):  # it may be large, and is not kept alive
            found[key] = (weakref.ref(value, lambda _: found.pop(key, None)), identity)
        else:
            found[key] = (value, identity)  # its id stays valid
    return found[key][1]


def identify_batches(batches: Iterable[Any], name: str = "data", *, seed: int = 0) -> Identity:
    """Return the identity of all batches in order, with torch's shuffling seeded by ``seed``."""
    digest = Digest()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        for batch in batches:
            add(digest, [(batch, name)])
            digest.forget()
    return Identity(digest.hexdigest(), tuple(digest.unchecked))


def identify_read(model: nn.Module, source: Any, weights: str, name: str = "model") -> Identity:
    """Return the identity of a model that gets its weights when it runs.

    Args:
        model: the model; its parameters need not hold values.
        source: what gives it the weights, through hooks; it is not inspected.
        weights: digest of the weights.
        name: name of the model in `Identity.unchecked`.
    """
    digest = Digest()
    digest.is_new(model)
    digest.is_new(source)  # so that only its order is added
    digest.put(weights)
    digest.hold(model.parameters())
    add(digest, of_layers(digest, model, name))
    return Identity(digest.hexdigest(), tuple(digest.unchecked))
