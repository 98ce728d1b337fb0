"""Which dimension of outputs ``(samples, a, b)`` holds the classes, told by the network itself.

A language model gives ``(samples, positions, classes)``, a convolution over a sequence ``(samples, classes,
positions)``, and no shape tells them apart. Two things do:

- Along the classes, probabilities and their logarithms are normalised.
- Each class has numbers of some weight to itself (a row of the last layer), and positions share theirs: the gradients
  of two halves of the classes have no number of that weight in common. Words that come in are left out of that, since
  a vocabulary may be the last layer too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model import forward as forwards

NORMALISED = 1e-4  # what sums of float32 probabilities are off by, and to spare
DIMS = 1, 2


def require_classes_last(model: nn.Module, batch: Any, forward: forwards.Forward | None, name: str) -> None:
    """Refuse outputs of three dimensions whose last one is not seen to hold the classes.

    Args:
        model: whose outputs they are.
        batch: to run.
        forward: how.
        name: of the loss.

    Raises:
        ModelError: the second dimension holds them, or the network does not tell; says what to write.

    >>> ids = torch.tensor([[0, 1, 2, 3, 4]])
    >>> require_classes_last(nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6)), ids, None, "kl")
    >>> require_classes_last(nn.Conv1d(2, 6, 3), torch.ones(1, 2, 7), None, "kl")
    Traceback (most recent call last):
    qcompress.errors.ModelError: loss 'kl' takes the last dimension for the classes; in outputs of shape ...
    """
    with torch.no_grad():
        output = forwards.run(model, batch, forward)
    shape = tuple(output.shape)
    found = _normalised(output) or _with_weights_of_their_own(model, batch, forward)
    if found == {2}:
        return
    if found == {1}:
        raise ModelError(
            f"loss {name!r} takes the last dimension for the classes; in outputs of shape {shape} the second one seems "
            "to hold them, by the weights that its places have to themselves or by their sums: give loss='kl:1', or "
            "loss='kl:-1' if it is the last nevertheless"
        )
    raise ModelError(
        f"loss {name!r} compares distributions over classes, and neither outputs of shape {shape} nor the network tell "
        "which dimension holds these: give loss='kl:1' for (samples, classes, positions), loss='kl:-1' for (samples, "
        "positions, classes)"
    )


@contextlib.contextmanager
def _words_apart(model: nn.Module) -> Iterator[None]:
    """While open no gradient reaches a weight by the rows that an Embedding looks up in it."""

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
    """Dimensions along which outputs are probabilities, or logarithms of them."""
    ones = {dim: (output.sum(dim), output.logsumexp(dim).exp()) for dim in DIMS if output.shape[dim] > 1}
    return {dim for dim, sums in ones.items() if any(bool(((own - 1).abs() < NORMALISED).all()) for own in sums)}


def _with_weights_of_their_own(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> set[int]:
    """Dimensions whose places have numbers of some weight to themselves; none where there are no gradients."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), _words_apart(model):
            output = forwards.run(model, batch, forward)
        as_long = {dim: [own for own in weights if output.shape[dim] in own.shape] for dim in DIMS}
        likely = {dim for dim in DIMS if _apart(output, dim, as_long[dim])}
        return likely if len(likely) == 1 else {dim for dim in DIMS if _apart(output, dim, weights)}
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return set()  # a model that does not run with gradients tells nothing by them
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


def _apart(output: Tensor, dim: int, weights: Sequence[Tensor]) -> bool:
    """Whether some weight has no number that serves both even and odd places of a dimension of the outputs."""
    length = output.shape[dim]
    if length < 2 or not weights or not output.requires_grad:
        return False
    shape = [length if own == dim else 1 for own in range(output.ndim)]
    even = (torch.arange(length, device=output.device) % 2 == 0).to(output).reshape(shape)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    halves = []
    for mask in (even, 1 - even):
        gradients = torch.autograd.grad(output, weights, noise * mask, retain_graph=True, allow_unused=True)
        halves.append([None if own is None else own.to_dense() != 0 for own in gradients])
    return any(
        one is not None and other is not None and bool(one.any() and other.any()) and not bool((one & other).any())
        for one, other in zip(*halves, strict=True)
    )
