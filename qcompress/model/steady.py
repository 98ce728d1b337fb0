"""Reproducible forward passes, which depend only on the weights and the batch.

Measuring compares outputs of the same batch under changed weights. A model that draws random numbers, counts its calls
or keeps statistics in buffers would give another output every time, and the difference would be mistaken for an effect
of the weights. So every pass starts from the same seeds and buffers, and state that a pass changes is restored and
recorded.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from qcompress.model.plain_state import PlainState, release
from qcompress.model.tensors import same_values

SAME = 1e-4  # tolerated relative difference, because accelerators round differently from run to run


class Steady:
    """A ``forward`` that starts every pass from the same seeds and state.

    Args:
        forward: how to run a batch; None for the default.
        seed: seed of torch, numpy and random, set before every pass; their states are restored afterwards.

    Attributes:
        moved: names of what passes changed and what was restored: tensors, and the plain attributes that matter for
            the output of the next pass.
        keeps_batches: whether ``forward`` changes no batch, so that it need not be given copies.
        gives_copies: outputs are copies, which stay what they are when state is restored or the model runs again.

    >>> noisy = lambda model, batch: model(batch) + torch.rand(())
    >>> steady, model, batch = Steady(noisy), nn.Linear(2, 2), torch.ones(1, 2)
    >>> torch.equal(steady(model, batch), steady(model, batch))
    True
    """

    gives_copies: ClassVar[bool] = True

    def __init__(self, forward: forwards.Forward | None = None, seed: int = 0) -> None:
        self._forward, self._seed = forward or forwards.default_forward, seed
        self.keeps_batches: bool = getattr(forward, "keeps_batches", False)
        self.moved: set[str] = set()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the batch, then restore all state.

        Raises:
            ModelError: a parameter changed, other than that of an Embedding with ``max_norm``.
        """
        versions = versions_of(model)
        try:
            with kept_state(model, self.moved), _seeded(self._seed):
                output = self._forward(model, batch)
                return output.clone() if isinstance(output, Tensor) else output
        finally:
            if changed := changed_since(versions, model):
                raise _changing(changed)

    def reseeded(self) -> "Steady":
        """Return a forward that starts from another seed."""
        return Steady(self._forward, self._seed + 1)

    def require_same(self, model: nn.Module, batch: Any) -> None:
        """Check that two runs give the same output, and note plain attributes by which one run affects the next.

        Parameters are compared by value, because autograd does not count a change through ``.data``. They are as before
        even if an error is raised.

        Raises:
            ModelError: the outputs differ, or a run changes a parameter.
            DataError: the model does not accept the batch.
        """
        with torch.no_grad(), _kept_parameters(model), forwards.first_pass(batch):
            state = PlainState(model)
            first = forwards.run_on(model, batch, self)
            if state.put_back():
                forwards.run_on(model, batch, self)
                following = forwards.run_on(model, batch, self)
                changed = state.put_back()
                if relative_difference(first, following) > SAME:
                    self.moved |= changed
            second = forwards.run(model, batch, self)
        if (difference := relative_difference(first, second)) > SAME:
            raise ModelError(
                "the model gives another output when the same batch is run again (difference "
                f"{difference:.2g} of the largest output), with the same seeds of torch, numpy and random, buffers and "
                "attributes: it keeps state elsewhere or uses another random generator; pass a forward that resets it"
            )


def versions_of(model: nn.Module) -> dict[str, int]:
    """Name → number of changes in place of every parameter, other than that of an Embedding with ``max_norm``."""
    limited = {f"{path}.weight".lstrip(".") for path, _ in _limited(model)}
    return {
        name: parameter._version
        for name, parameter in model.named_parameters()
        if name not in limited and not parameter.is_inference()
    }


def changed_since(versions: dict[str, int], model: nn.Module) -> list[str]:
    """Return the names of the parameters that changed in place since `versions_of` returned ``versions``."""
    return [name for name, version in versions_of(model).items() if versions.get(name, version) != version]


@contextlib.contextmanager
def kept_state(model: nn.Module, moved: set[str] | None = None) -> Iterator[None]:
    """Restore the values of buffers, and of embeddings with ``max_norm``, on exit.

    Args:
        model: the model.
        moved: set to which the names of those that the block changed are added.
    """
    moved = set() if moved is None else moved
    buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    loose = [buffer for buffer, _ in buffers.values() if buffer.is_leaf]
    limited = [
        (f"{path}.weight".lstrip("."), module.weight, module.weight.detach().clone())
        for path, module in _limited(model)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, (buffer, before) in buffers.items():
                path, _, key = name.rpartition(".")
                owner = model.get_submodule(path)
                now = owner._buffers.get(key)
                if now is not buffer or not same_values(buffer, before):
                    moved.add(name)
                    if buffer.shape == before.shape and not buffer.is_sparse:
                        buffer.copy_(before)
                    owner._buffers[key] = before if buffer.is_sparse else buffer
            for name, weight, before in limited:
                if not torch.equal(weight, before):
                    moved.add(name)
                    weight.copy_(before)
        for buffer in loose:
            release(buffer)


def _limited(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    """Return the embeddings that every pass makes comply with their ``max_norm``, with their paths."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.max_norm is not None
    ]


def steady(forward: forwards.Forward | None, seed: int = 0) -> Steady:
    """Return ``forward`` as a `Steady`, if it is not one already."""
    return forward if isinstance(forward, Steady) else Steady(forward, seed)


def _changing(changed: list[str]) -> ModelError:
    return ModelError(
        f"running the model changed its parameters {', '.join(changed)}, so that another model would be "
        "measured; change the forward pass so that it does not modify them, or make them buffers"
    )


@contextlib.contextmanager
def _kept_parameters(model: nn.Module) -> Iterator[None]:
    """Restore the values of every parameter on exit.

    Raises:
        ModelError: the block changed one and raised no other error.
    """
    before = [
        (name, parameter, parameter.data, parameter.detach().to("cpu", copy=True))  # accelerators may be full
        for name, parameter in model.named_parameters()
        if not parameter.is_meta
    ]
    changed: list[str] = []
    try:
        yield
    finally:
        for name, parameter, memory, values in before:
            if not same_values(parameter.detach().cpu(), values):
                changed.append(name)
                parameter.data = memory.copy_(values)
    if changed:
        raise _changing(changed)


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference, relative to the largest number of ``first``."""
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    difference, largest = float((first - second).abs().max()), float(first.abs().max())
    return difference / largest if largest else float("inf") if difference else 0.0


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:  # manual_seed keeps a stack trace for each kind that is not there, slower than a small model
            torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)  # noqa: NPY002
