"""Rounding of a layer's inputs and outputs to 8 bits, as integer kernels do it.

A range that contains 0 is mapped to codes from 0 to 255 with one step and one zero point for the whole tensor; values
outside the range are clipped. Invariants: 0 stays 0, rounding is idempotent, and gradients pass through unchanged
(straight-through estimator).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.function_transforms import in_transform, outside_transforms

LEVELS = 255


@dataclass(frozen=True, slots=True)
class Range:
    """A uniform grid of 256 values from ``low`` to ``high``, one of which is 0.

    >>> Range(-1.0, 3.0).rounded(torch.tensor([-2.0, 0.0, 0.5, 9.0]))
    tensor([-1.0039,  0.0000,  0.5020,  2.9961])
    """

    low: float
    high: float

    @property
    def step(self) -> float:
        """The step between neighbouring values, representable in float32."""
        return float(np.float32((max(self.high, 0.0) - min(self.low, 0.0)) / LEVELS)) or 1.0

    @property
    def zero(self) -> int:
        """The code that stands for 0."""
        return int(min(max(round(-min(self.low, 0.0) / self.step), 0), LEVELS))

    def rounded(self, values: Tensor) -> Tensor:
        """Round ``values`` to the grid."""
        return _through(values, self.step, self.zero)


@dataclass(frozen=True, slots=True)
class Activations:
    """How a layer's activations are rounded.

    Attributes:
        inputs: the range of the layer's input, or None to take the range of each tensor at run time.
        outputs: the range of the layer's output, or None to leave it unrounded.
    """

    inputs: Range | None
    outputs: Range | None

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a layer with its input rounded, unless it holds whole numbers."""
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._rounded(kwargs["input"])}

    def after(self, output: Tensor) -> Tensor:
        """Return the layer's output, rounded."""
        return output if self.outputs is None else self.outputs.rounded(output)

    @contextlib.contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """Let ``module`` round its activations inside the block."""
        handles = self.attach(module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, module: nn.Module) -> tuple[Any, Any]:
        """Make ``module`` round its activations from now on; returns the handles that remove the hooks."""
        return (
            module.register_forward_pre_hook(RoundInputs(self), with_kwargs=True),
            module.register_forward_hook(RoundOutputs(self)),
        )

    def _rounded(self, values: Tensor) -> Tensor:
        if not values.is_floating_point():
            return values  # words of an Embedding that shares its weight with a Linear layer
        if self.inputs is not None:
            return self.inputs.rounded(values)
        with outside_transforms(values.detach()) as (seen,):
            low, high = (float(end) for end in torch.aminmax(seen))
        if not math.isfinite(low) or not math.isfinite(high):
            raise NotFiniteError("the inputs of a layer that rounds them hold NaN or infinity")
        span = Range(low, high)
        return _through(values, span.step, span.zero)


def detach(module: nn.Module) -> None:
    """Remove the rounding of activations from a layer."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, (RoundInputs, RoundOutputs)):
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


class RoundInputs:
    """A forward pre-hook that rounds the input."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """Return the arguments with the input rounded."""
        return self.activations.before(args, kwargs) if _Rounding.on else None


class RoundOutputs:
    """A forward hook that rounds the output."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:  # noqa: ARG002
        """Return the output, rounded."""
        return self.activations.after(output) if _Rounding.on else None


class _Rounding:
    """Whether the hooks round. Off while a model is traced for an engine, whose own operators do the rounding."""

    on = True


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """Round no activation inside the block."""
    before, _Rounding.on = _Rounding.on, False
    try:
        yield
    finally:
        _Rounding.on = before


def _through(values: Tensor, step: float, zero: int) -> Tensor:
    """Round ``values`` to a grid; gradients pass through unchanged."""
    detached = values.detach()
    wide = detached.to(torch.promote_types(detached.dtype, torch.float32))
    codes = wide.div(step).round_()
    clamp = codes.clamp if in_transform() else codes.clamp_  # torch.func.vmap maps only the first
    rounded = clamp(-zero, LEVELS - zero).mul_(step).to(values.dtype)
    return values + (rounded - detached) if values.requires_grad else rounded
