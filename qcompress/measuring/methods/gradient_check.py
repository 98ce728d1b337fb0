"""Check with few passes, and without false alarms, whether outputs follow the gradients of weights.

A straight-through estimator, or a path cut by `detach`, gives a gradient that exists but is wrong. If a weight moves in
a random direction by a small share of its size, the outputs must change as the gradients predict. (The gradient itself
is not a useful direction: what it lacks is orthogonal to it.) The change is measured by `PROBES` random sums of the
outputs; the difference between a step forward and a step back cancels the second order. If a step does not match, a
smaller one is tried, because networks are curved and a step may leave the domain of the outputs (of a logarithm); then
other directions, because networks have kinks. A wrong gradient stays wrong. Discrete choices, such as the experts that
a router selects, are kept as without the move (`choices`). Layers are moved in groups, each layer so far that all
change the outputs equally, and one by one only if a group does not match. The larger a group, the more closely it must
match, so that one wrong layer among many shows. Half precision would round such steps away, so a model in half
precision is checked in float32 with the same numbers (`widened`). Where a network rounds what depends on a weight, or
computes in half precision, larger steps are needed to see its effect, and a larger difference is tolerated (`rounded`).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.measuring.memory import MemoryTrimmer, return_free_memory
from qcompress.measuring.methods import evidence
from qcompress.measuring.methods.choices import HeldChoices
from qcompress.measuring.methods.rounded import rounded
from qcompress.model.modes import differentiable
from qcompress.model.scores import random_numbers

RANK = 8
"""Rank of the random directions."""

PROBES = 4
"""Number of random sums of the outputs whose changes are compared."""

GROUPS, SMALLEST_GROUP = 8, 4
"""Number of groups that the layers are divided into, if none has fewer layers than this."""

ATTEMPTS = 3
"""Number of random directions that must all fail: a single kink does not make a gradient wrong."""

HALF_A_LAYER = 0.5
"""Share of one layer's predicted change: a group that misses more fails. Changes add up like random numbers."""

LARGEST_SHARE = 10.0
"""Largest factor by which a weight is moved farther, or less far, to change the outputs as much as the others."""


@dataclass(frozen=True, slots=True)
class _Steps:
    """Moves of a weight.

    Attributes:
        sizes: how far it is moved, relative to its size; a later step is tried if those before do not match.
        together, alone: relative difference of predicted and actual change above which a group, or a layer, fails.
    """

    sizes: tuple[float, ...]
    together: float
    alone: float


SMALL = _Steps((3e-3, 3e-4, 3e-5), 0.05, 0.1)
LARGE = _Steps((1e-1,), 0.15, 0.3)


@torch.no_grad()
def misleading(
    run: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    generator: torch.Generator,
    several: Callable[[], Tensor] | None = None,
) -> list[int]:
    """Return the indices of weights whose gradient the outputs do not follow, unless rounding may explain it.

    Of weights in half precision rounding may explain everything, and the result is empty.

    Args:
        run: function that returns the outputs of some samples, the same on every call.
        weights: weights to move; exactly restored afterwards.
        generator: generator for the probes and directions.
        several: same as ``run`` with more samples, for weights whose effect is rounded: of few numbers, none may be
            rounded otherwise.

    >>> layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    >>> rounded = lambda: (y := layer(x)) + (torch.round(4 * y) / 4 - y).detach()
    >>> [misleading(run, [layer.weight], torch.Generator()) for run in (lambda: layer(x), rounded)]
    [[], [0]]
    """
    if any(evidence.half(weight) for weight in weights):
        return []  # steps this small are lost in the rounding
    suspects, in_half = rounded(run, weights)
    if in_half:
        return _always_wrong(run, weights, range(len(weights)), generator, LARGE)
    wrong = _always_wrong(run, weights, range(len(weights)), generator, SMALL)
    return sorted({*wrong, *_always_wrong(several or run, weights, set(suspects).difference(wrong), generator, LARGE)})


def _always_wrong(
    run: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    suspects: Iterable[int],
    generator: torch.Generator,
    steps: _Steps,
) -> list[int]:
    """Return those of some weights that the outputs follow in no direction."""
    wrong = sorted(suspects)
    for attempt in range(ATTEMPTS):
        if not wrong:
            break
        together = 1 if attempt else max(-(-len(wrong) // GROUPS), SMALLEST_GROUP)
        some = [weights[index] for index in wrong]
        wrong = [wrong[place] for place in _not_followed(run, some, generator, steps, together=together)]
    return wrong


def _not_followed(
    run: Callable[[], Tensor],
    weights: Sequence[nn.Parameter],
    generator: torch.Generator,
    steps: _Steps,
    *,
    together: int,
) -> list[int]:
    """Return the indices of weights that the outputs do not follow in one random direction; see `misleading`."""
    with_gradients, run = run, HeldChoices(run)
    run()  # without gradients, with which a network may look at other numbers
    moves = _Moves(weights, generator)
    probes = _Probes(torch.randint(2**31, (PROBES,), generator=generator).tolist())
    slopes, point = _slopes(with_gradients, moves, probes)
    return_free_memory()  # of the backward passes
    if evidence.half(point):
        return []
    noise = 16 * torch.finfo(point.dtype).eps * probes.size(point)
    del point
    sizes = {index: float(slope.norm()) for index, slope in enumerate(slopes) if bool(slope.any())}
    if not sizes:
        return []
    middle = float(torch.tensor(list(sizes.values())).median())
    shares = {i: min(max(middle / size, 1 / LARGEST_SHARE), LARGEST_SHARE) for i, size in sizes.items()}

    def follows(indices: list[int], tolerance: float) -> bool:
        return any(follows_at(step, indices, tolerance) for step in steps.sizes)

    def follows_at(step: float, indices: list[int], tolerance: float) -> bool:
        lengths = {index: step * shares[index] for index in indices}
        each = torch.stack([length * slopes[index] for index, length in lengths.items()])
        size = float(each.norm())
        if noise > steps.alone * size and step != steps.sizes[0]:
            return False  # rounding would hide whether they do
        sums = []
        for sign in (1.0, -1.0):
            with moves.moved({index: sign * length for index, length in lengths.items()}):
                try:
                    sums.append(probes.sums(run()))
                except NotFiniteError:
                    return False
        missed = float((0.5 * (sums[0] - sums[1]) - each.sum(0)).norm())
        return math.isfinite(missed) and missed <= tolerance * size + noise

    order, wrong = list(sizes), []
    for start in range(0, len(order), together):
        group = order[start : start + together]
        if len(group) == 1 or not follows(group, min(steps.together, HALF_A_LAYER / len(group) ** 0.5)):
            wrong += [index for index in group if not follows([index], steps.alone)]
    return wrong


class _Moves:
    """Random directions of weights, each as large as its weight; of low rank, so that they take little memory."""

    def __init__(self, weights: Sequence[nn.Parameter], generator: torch.Generator) -> None:
        self.weights = weights
        self._factors = [_factors(weight.detach(), generator) for weight in weights]

    def slope(self, index: int, gradient: Tensor) -> float:
        """Return the derivative along the direction of the weight with this index."""
        left, right = self._factors[index]
        return float(((gradient.reshape(len(left), -1) @ right) * left).sum(dtype=torch.float64))

    @contextlib.contextmanager
    def moved(self, lengths: Mapping[int, float]) -> Iterator[None]:
        """Move weights, given by index; restore them exactly on exit."""
        before = {index: self.weights[index].detach().clone() for index in lengths}
        try:
            for index, length in lengths.items():
                weight, (left, right) = self.weights[index], self._factors[index]
                if weight.is_contiguous():
                    weight.view(len(left), -1).addmm_(left, right.mT, alpha=length)
                else:
                    weight.add_((left @ right.mT).reshape(weight.shape), alpha=length)
            yield
        finally:
            for index, original in before.items():
                self.weights[index].copy_(original)


def _factors(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``(rows, r)`` and ``(columns, r)``, the product of which is a direction."""
    rows = weight.shape[0] if weight.ndim else 1
    left, right = (
        torch.randn(size, RANK, generator=generator).to(weight) for size in (rows, weight.numel() // max(rows, 1))
    )
    return left * (weight.norm() / ((left.mT @ left) * (right.mT @ right)).sum().sqrt()), right


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[bool]:
    """Turn tensors of half precision into float32; restore the original tensors on exit.

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


class _Probes:
    """Random sums of outputs; their weights are drawn again whenever they are needed, because outputs may be large."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds

    def each(self, output: Tensor) -> Iterator[Tensor]:
        """Yield the weights of every sum, in the shape of the output."""
        for seed in self._seeds:
            yield random_numbers(output.shape, output, torch.Generator().manual_seed(seed))

    def sums(self, output: Tensor) -> Tensor:
        """Return ``(probes,)`` sums of the output."""
        return torch.stack([probe.mul_(output).sum(dtype=torch.float64) for probe in self.each(output)]).cpu()

    def size(self, output: Tensor) -> float:
        """Return the norm of all terms of all sums."""
        return float(torch.stack([probe.mul_(output).norm() for probe in self.each(output)]).norm())


def _slopes(run: Callable[[], Tensor], moves: _Moves, probes: _Probes) -> tuple[Tensor, Tensor]:
    """Return the ``(weights, probes)`` slopes of the sums along every direction, and the outputs."""
    weights = moves.weights
    hooks, trimmer = [], MemoryTrimmer()
    slopes = torch.zeros(len(weights), PROBES, dtype=torch.float64)
    number = 0

    def take(weight: Tensor, index: int) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        trimmer.after(gradient.nbytes)  # memory of layers that the backward pass is done with
        slopes[index, number] = moves.slope(index, gradient)

    with differentiable(weights), torch.enable_grad():
        try:
            for index, weight in enumerate(weights):
                hooks.append(weight.register_post_accumulate_grad_hook(functools.partial(take, index=index)))  # type: ignore[no-untyped-call]
            output = run()
            if output.requires_grad and weights:
                for number, probe in enumerate(probes.each(output.detach())):
                    keep = number + 1 < PROBES
                    output.backward(probe, inputs=list(weights), retain_graph=keep)  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
    return slopes, output.detach()
