"""Rounding of what goes into a layer, and of what comes out, to 8 bits, as integer kernels do it.

A range of numbers that holds 0 becomes codes from 0 to 255 with a step and a zero point, both for the whole tensor;
numbers beyond it become its ends. What always holds: 0 stays 0, rounding what is rounded changes nothing, and where
gradients are asked for they pass as if nothing was rounded.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 255


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high`` in 256 steps, of which one is 0.

    >>> Range(-1.0, 3.0).rounded(torch.tensor([-2.0, 0.0, 0.5, 9.0]))
    tensor([-1.0039,  0.0000,  0.5020,  2.9961])
    """

    low: float
    high: float

    @property
    def step(self) -> float:
        """The step, a float32 number."""
        return float(np.float32((max(self.high, 0.0) - min(self.low, 0.0)) / LEVELS)) or 1.0

    @property
    def zero(self) -> int:
        """The code of 0."""
        return int(min(max(round(-min(self.low, 0.0) / self.step), 0), LEVELS))

    def rounded(self, values: Tensor) -> Tensor:
        """``values`` on the grid."""
        return _through(values, self.step, self.zero)


@dataclass(frozen=True, slots=True)
class Activations:
    """How a layer's activations are rounded.

    Attributes:
        inputs: the range of what goes in; None for that of every tensor as it comes, which is looked up when it runs.
        outputs: the range of what comes out; None where it is left as it is.
    """

    inputs: Range | None
    outputs: Range | None

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a layer with its input rounded."""
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._rounded(kwargs["input"])}

    def after(self, output: Tensor) -> Tensor:
        """The layer's output, rounded."""
        return output if self.outputs is None else self.outputs.rounded(output)

    @contextlib.contextmanager
    def on(self, module: nn.Module) -> Iterator[None]:
        """A ``with`` block in which ``module`` rounds."""
        handles = self.attach(module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self, module: nn.Module) -> tuple[Any, Any]:
        """Let ``module`` round from now on; gives the handles that end it."""
        return (
            module.register_forward_pre_hook(RoundInputs(self), with_kwargs=True),
            module.register_forward_hook(RoundOutputs(self)),
        )

    def _rounded(self, values: Tensor) -> Tensor:
        if self.inputs is not None:
            return self.inputs.rounded(values)
        low, high = (float(end) for end in torch.aminmax(values.detach()))
        span = Range(low, high)
        return _through(values, span.step, span.zero)


def detach(module: nn.Module) -> None:
    """Let a layer no longer round its activations."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if isinstance(hook, (RoundInputs, RoundOutputs)):
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


class RoundInputs:
    """A forward pre-hook."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        """The arguments with the input rounded."""
        return self.activations.before(args, kwargs) if _Rounding.on else None


class RoundOutputs:
    """A forward hook."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:  # noqa: ARG002
        """The output, rounded."""
        return self.activations.after(output) if _Rounding.on else None


class _Rounding:
    """Whether hooks round; off while a model is traced for an engine, whose own operators do it."""

    on = True


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """A ``with`` block in which no activation is rounded."""
    before, _Rounding.on = _Rounding.on, False
    try:
        yield
    finally:
        _Rounding.on = before


def _through(values: Tensor, step: float, zero: int) -> Tensor:
    """``values`` on a grid; gradients pass as if they were not."""
    detached = values.detach()
    wide = detached.to(torch.promote_types(detached.dtype, torch.float32))
    codes = wide.div(step).round_().clamp_(-zero, LEVELS - zero)
    rounded = codes.mul_(step).to(values.dtype)
    return values + (rounded - detached) if values.requires_grad else rounded
