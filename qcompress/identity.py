"""Digests of values: equal across processes for equal values, with a list of everything that could not be inspected.

An interrupted run resumes only if nothing that it depends on has changed. Numbers, tensors, containers, models,
functions (their code, defaults, closure and the functions they call), modules of the user and plain objects are
inspected; classes count besides contents, so a list is not a tuple. Everything from Python's standard library or an
installed package is identified by its name, including the private attributes that it keeps in modules. What cannot be
inspected (a lock, an open file, compiled code, what is looked up with ``globals``, ``eval`` or ``import_module``) is
listed in `Identity.unchecked`, so that the caller can warn. So are several objects of one class in a set, which has no
order that is the same in every process, and attributes and globals that a model's own code writes in a forward pass,
unless they are empty: counters and stored activations must not count, but a state that the output depends on looks the
same. What an object hides from `pickle` and what was registered within a library are not seen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompress.digests.walk import Digest


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
    digest.add(value, name)
    return Identity(digest.hexdigest(), tuple(digest.unchecked))


def identify_batches(batches: Iterable[Any], name: str = "data", *, seed: int = 0) -> Identity:
    """Return the identity of all batches in order, with torch's shuffling seeded by ``seed``."""
    digest = Digest()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        for batch in batches:
            digest.add(batch, name)
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
    digest.leave_out(source)
    digest.add(weights, name)
    digest.hold(model.parameters())
    digest.add_all(digest.of_layers(model, name))
    for path, buffer in model.named_buffers():
        digest.add(path, name)
        digest.add(buffer, f"{name}.{path}")
    return Identity(digest.hexdigest(), tuple(digest.unchecked))
