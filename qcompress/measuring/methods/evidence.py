"""Tests of whether a gradient can be trusted.

A linearised prediction is valid if the gradients of the layers' calls capture everything that a change of the weight
does. Three things break it silently: values of a layer's output that belong to no single sample (statistics over a
batch, a position shared by all samples), a weight that is also used outside its layer, and steps that autograd does not
see (``no_grad``, ``detach``, rounding, numpy). There is a test for each:

- Scale the probe of each sample by its own factor: the gradient of a value that belongs to one sample is scaled alike.
- Let the layer's calls use the weight without gradient (`calls.Recorder`): one that reaches it comes from elsewhere.
- Change weights slightly, run the model, and compare the change of the outputs with the prediction (`moves`).
"""

import torch
from torch import Tensor

from qcompress.measuring.methods.calls import Call
from qcompress.measuring.methods.products import Place
from qcompress.model import layers

EXACT = 1e-3  # for two float32 gradients that only differ in the order of their sums
ROUNDED = 5e-2  # the same in half precision
STEP, STEP_ROUNDED = 1e-3, 5e-2  # how far weights are moved, relative to their size
FOLLOWS, FOLLOWS_ROUNDED = 0.1, 0.5  # tolerated relative difference of predicted and actual outputs at such a step
MISLED = "the outputs do not follow its gradient"
UNSEEN = "no gradient reaches it, but its weight has an effect"
FEW = 0.1  # share of the samples that may exceed the tolerance (a unit that switches)


def without_gradients(error: Exception) -> str:
    """Return the reason to evaluate options one by one in a model that ended in an error of its backward pass."""
    message = str(error).partition("\n")[0]
    return f"the model does not run with gradients ({type(error).__name__}{message and f': {message}'})"


def half(values: Tensor) -> bool:
    """Whether the dtype is a half-precision one."""
    return torch.finfo(values.dtype).eps > 1e-4


def sample_factors(num_samples: int, generator: torch.Generator) -> Tensor:
    """Return ``(samples,)`` factors, evenly spaced from 1 to 2, in random order."""
    return torch.linspace(1, 2, num_samples)[torch.randperm(num_samples, generator=generator)]


def place_of(call: Call, gradient: Tensor, scaled: Tensor, factors: Tensor) -> Place | None:
    """Locate the samples in a call's output; None if some values belong to no single sample.

    Args:
        call: a call of a layer.
        gradient: gradient of a probe with respect to the call's output.
        scaled: the same gradient with the probe of every sample multiplied by its factor.
        factors: ``(samples,)`` factors.
    """
    samples, channels = len(factors), layers.channel_dim(call.module, gradient)
    gradient, scaled, factors = (value.float() for value in (gradient, scaled, factors))
    size = float(scaled.norm())
    tolerance = (ROUNDED if half(call.output) else EXACT) * size
    for dim in range(gradient.ndim):
        length = gradient.shape[dim]
        if dim == channels or length % samples or (dim > 0 and length != samples):
            continue
        shape = [1] * gradient.ndim
        shape[dim] = length
        factor = factors.repeat_interleave(length // samples).reshape(shape)
        if float(torch.addcmul(scaled, gradient, factor, value=-1).norm()) <= tolerance:
            return Place(dim=dim)
    by_position, by_position_scaled = (
        value.movedim(channels, -1).reshape(-1, value.shape[channels]) for value in (gradient, scaled)
    )
    square = by_position.square().sum(-1)
    ratio = (by_position * by_position_scaled).sum(-1) / torch.where(square > 0, square, 1.0)
    owner = (factors - ratio[:, None]).abs().argmin(-1)
    lost = float((by_position_scaled - factors[owner, None] * by_position).norm())
    # the ratios must be far closer to one factor than to the next
    return Place(owner=owner) if lost <= min(tolerance, 0.1 * size / max(samples - 1, 1)) else None


def tolerance(*, rounded: bool) -> float:
    """Tolerated relative difference of predicted and actual outputs, when a layer is moved alone."""
    return FOLLOWS_ROUNDED if rounded else FOLLOWS


def follows(predicted: Tensor, actual: Tensor, noise: Tensor, tolerance: float) -> bool:
    """Whether outputs change as predicted.

    Args:
        predicted: ``(samples, probes)`` products of the probes with the predicted change.
        actual: ``(samples, probes)`` products of the probes with the true change.
        noise: ``(samples,)`` difference that rounding alone may cause.
        tolerance: relative difference that is tolerated.
    """
    size = torch.maximum(predicted.norm(dim=1), actual.norm(dim=1))
    size = torch.maximum(size, size.median())
    difference = ((actual - predicted).norm(dim=1) - noise).clamp(min=0)
    wrong = difference > tolerance * size
    return float(wrong.float().mean()) <= FEW and float(difference.norm()) <= tolerance * float(size.norm())
