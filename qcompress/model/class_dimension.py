"""Find out which dimension of outputs ``(samples, a, b)`` holds the classes.

A language model returns ``(samples, positions, classes)``, a convolution over a sequence ``(samples, classes,
positions)``. The shape does not distinguish them, but two properties of the network do:

- Probabilities and their logarithms are normalised along the classes.
- Every class has weights of its own (a row of the last layer), while positions share them: the gradients of two halves
  of the classes are non-zero at different entries of some weight. Embedding lookups are excluded from these gradients,
  because an embedding may share its weight with the last layer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from qcompress.model.losses import NORMALISED
from qcompress.model.modes import differentiable

DIMS = 1, 2


def require_classes_last(model: nn.Module, batch: Any, forward: forwards.Forward | None, name: str) -> None:
    """Refuse three-dimensional outputs unless the last dimension is found to hold the classes.

    Args:
        model: the model.
        batch: batch to run.
        forward: how to run it.
        name: name of the loss, for the message.

    Raises:
        ModelError: the second dimension holds the classes, or it is unclear; the message says how to state it.

    >>> ids = torch.tensor([[0, 1, 2, 3, 4]])
    >>> require_classes_last(nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6)), ids, None, "kl")
    >>> require_classes_last(nn.Conv1d(2, 6, 3), torch.ones(1, 2, 7), None, "kl")
    Traceback (most recent call last):
    qcompress.errors.ModelError: loss 'kl' takes the last dimension for the classes; in outputs of shape ...
    """
    with torch.no_grad():
        output = forwards.run(model, batch, forward)
    shape = tuple(output.shape)
    dims = _normalised(output) or _with_weights_of_their_own(model, batch, forward)
    if dims == {2}:
        return
    if dims == {1}:
        raise ModelError(
            f"loss {name!r} takes the last dimension for the classes; in outputs of shape {shape} the second one seems "
            "to hold them, judging by the weights of the last layer or by sums that are 1: give loss='kl:1', or "
            "loss='kl:-1' if it is the last one after all"
        )
    raise ModelError(
        f"loss {name!r} compares distributions over classes, and neither outputs of shape {shape} nor the network tell "
        "which dimension holds these: give loss='kl:1' for (samples, classes, positions), loss='kl:-1' for (samples, "
        "positions, classes)"
    )


@contextlib.contextmanager
def _words_apart(model: nn.Module) -> Iterator[None]:
    """Keep gradients from weights through embedding lookups inside the block."""

    def cut(module: nn.Module, given: Any, output: Any) -> Any:  # noqa: ARG001
        return output.detach() if isinstance(output, Tensor) else output

    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [module.register_forward_hook(cut) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _normalised(output: Tensor) -> set[int]:
    """Return the dimensions along which the outputs are probabilities or their logarithms."""
    ones = {dim: (output.sum(dim), output.logsumexp(dim).exp()) for dim in DIMS if output.shape[dim] > 1}
    return {dim for dim, sums in ones.items() if any(bool(((total - 1).abs() < NORMALISED).all()) for total in sums)}


def _with_weights_of_their_own(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> set[int]:
    """Return the dimensions whose entries have weights of their own; none if the model has no gradients."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    try:
        with differentiable(weights):
            with torch.enable_grad(), _words_apart(model):
                output = forwards.run(model, batch, forward)
            as_long = {dim: [weight for weight in weights if output.shape[dim] in weight.shape] for dim in DIMS}
            likely = {dim for dim in DIMS if _apart(output, dim, as_long[dim])}
            return likely if len(likely) == 1 else {dim for dim in DIMS if _apart(output, dim, weights)}
    except RuntimeError as error:
        if forwards.is_out_of_memory(error):
            raise
        return set()  # without gradients nothing is known; the caller then refuses


def _apart(output: Tensor, dim: int, weights: Sequence[Tensor]) -> bool:
    """Whether some weight affects even and odd indices of a dimension of the outputs by different entries."""
    length = output.shape[dim]
    if length < 2 or not weights or not output.requires_grad:
        return False
    shape = [length if axis == dim else 1 for axis in range(output.ndim)]
    even = (torch.arange(length, device=output.device) % 2 == 0).to(output).reshape(shape)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    halves = []
    for mask in (even, 1 - even):
        gradients = torch.autograd.grad(output, weights, noise * mask, retain_graph=True, allow_unused=True)
        halves.append([None if gradient is None else gradient.to_dense() != 0 for gradient in gradients])
    return any(
        even is not None and odd is not None and bool(even.any() and odd.any()) and not bool((even & odd).any())
        for even, odd in zip(*halves, strict=True)
    )
