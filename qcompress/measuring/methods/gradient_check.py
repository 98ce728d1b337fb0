"""Check with few passes, and without false alarms, whether outputs follow the gradients of weights.

A straight-through estimator, or a path partly cut by `detach`, gives a gradient that exists but is wrong. Moving a
weight along its gradient by a small share ``s`` of its size must change a probed output by ``s·‖W‖·‖g‖``; taking the
difference of a step forward and a step back cancels the second order. Deep networks curve even along their gradients,
so a smaller step is tried if one does not match: a wrong gradient stays wrong. Layers are checked in groups, each layer
with the same share of the predicted change, and one by one only where a group does not match. The larger a group, the
closer it has to match, so that one wrong layer among many shows. Half precision would round such steps away, so a model
in half precision is checked while it holds the same numbers in float32 (`widened`).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qcompress.measuring.memory import Returning, return_free_memory
from qcompress.measuring.methods import evidence

STEPS = 3e-4, 3e-5
"""How far a weight is moved, relative to its size; the second step is tried if the first is not linear enough."""

GROUPS = 8
"""Number of groups that the layers are divided into."""

TOGETHER, ALONE = 0.05, 0.2
"""Relative difference of predicted and actual change above which a group, or a single layer, fails the check."""

HALF_A_LAYER = 0.5
"""Share of one layer's predicted change: a group that misses more of its sum fails, however many layers it has."""

LARGEST_SHARE = 10.0
"""Largest factor by which a weight is moved farther, or less far, to contribute an equal share."""


@torch.no_grad()
def misleading(run: Callable[[], Tensor], weights: Sequence[nn.Parameter], generator: torch.Generator) -> list[int]:
    """Return the indices of weights whose gradient the outputs do not follow, unless rounding may explain it.

    In half precision rounding may explain everything, and the result is empty.

    Args:
        run: function that returns the outputs of some samples, the same on every call.
        weights: weights to move; exactly restored afterwards.
        generator: generator for the probe.

    >>> layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    >>> rounded = lambda: (y := layer(x)) + (torch.round(4 * y) / 4 - y).detach()
    >>> [misleading(run, [layer.weight], torch.Generator()) for run in (lambda: layer(x), rounded)]
    [[], [0]]
    """
    size, probe, directions = _probed(run, weights, generator)
    return_free_memory()  # of the backward pass
    if evidence.half(probe) or any(evidence.half(weight) for weight in weights):
        return []  # steps this small are lost in the rounding
    sizes = {index: slope * float(weights[index].norm()) for index, (_, slope) in directions.items()}
    sizes = {index: size for index, size in sizes.items() if size > 0}
    if not sizes:
        return []
    middle = float(torch.tensor(list(sizes.values())).median())
    noise = 16 * torch.finfo(probe.dtype).eps * size

    def follows(indices: list[int], tolerance: float) -> bool:
        return any(follows_at(step, indices, tolerance) for step in STEPS)

    def follows_at(step: float, indices: list[int], tolerance: float) -> bool:
        before = [weights[index].detach().clone() for index in indices]
        lengths, predicted = [], 0.0
        for index in indices:
            share = min(max(middle / sizes[index], 1 / LARGEST_SHARE), LARGEST_SHARE)
            lengths.append(step * share * float(weights[index].norm()))
            predicted += step * share * sizes[index]
        outcomes = []
        try:
            for sign in (1.0, -1.0):
                for index, original, length in zip(indices, before, lengths, strict=True):
                    torch.add(original, directions[index][0], alpha=sign * length, out=weights[index])
                outcomes.append(float((probe * run()).sum(dtype=torch.float64)))
        finally:
            for index, original in zip(indices, before, strict=True):
                weights[index].copy_(original)
        return abs(0.5 * (outcomes[0] - outcomes[1]) - predicted) <= tolerance * predicted + noise

    order, wrong = list(sizes), []
    together = -(-len(order) // GROUPS)
    for start in range(0, len(order), together):
        group = order[start : start + together]
        if not follows(group, min(TOGETHER, HALF_A_LAYER / len(group))):
            wrong += [index for index in group if not follows([index], ALONE)]
    return wrong


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[bool]:
    """Context manager in which tensors of half precision are float32; afterwards the original tensors are restored.

    Yields whether there are any such tensors.

    >>> layer = nn.Linear(2, 2).bfloat16()
    >>> with widened(layer) as wide:
    ...     wide, layer.weight.dtype
    (True, torch.float32)
    >>> layer.weight.dtype
    torch.bfloat16
    """
    everything = (*model.parameters(), *model.buffers())
    tensors = [tensor for tensor in everything if tensor.is_floating_point() and evidence.half(tensor)]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield bool(tensors)
    finally:
        for tensor, original in zip(tensors, before, strict=True):
            tensor.data = original


def _probed(
    run: Callable[[], Tensor], weights: Sequence[nn.Parameter], generator: torch.Generator
) -> tuple[float, Tensor, dict[int, tuple[Tensor, float]]]:
    """Return the size of the probed outputs, the random probe, and the direction and slope of every nonzero gradient.

    Directions are of about length 1 and kept in bfloat16, in half the memory of the weights; slopes are those along
    the rounded directions.
    """
    flags, hooks, returning = [weight.requires_grad for weight in weights], [], Returning()
    directions: dict[int, tuple[Tensor, float]] = {}

    def take(weight: Tensor, index: int) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        returning.after(gradient.nbytes)  # memory of layers that the backward pass is done with
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        norm = float(torch.linalg.vector_norm(gradient))
        if norm > 0:
            unit = gradient.div_(norm)
            narrow = unit.to(torch.bfloat16)
            directions[index] = narrow, norm * float(unit.mul_(narrow).sum(dtype=torch.float64))

    try:
        for index, weight in enumerate(weights):
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(functools.partial(take, index=index)))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            output = run()
            probe = torch.randn(output.shape, generator=generator).to(output)
            size = float((probe * output.detach()).norm())
            if output.requires_grad and weights:
                output.backward(probe, inputs=list(weights))  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return size, probe, directions
