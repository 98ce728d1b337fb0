"""A faster backward pass through batch norms in evaluation mode.

With fixed statistics a batch norm multiplies every channel by one number, and so does its backward pass. PyTorch's
backward pass also sums up the gradients of the norm's own weights, needed or not, which takes several times as long on
a CPU.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


def quick_norms(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Reduce the backward pass of a model's batch norms to one product; outputs stay the same.

    Norms with the statistics of the batch stay as they are, and so do those whose own weights need a gradient.

    >>> model, x = nn.BatchNorm1d(2).requires_grad_(False).eval(), torch.ones(1, 2, requires_grad=True)
    >>> with quick_norms(model):
    ...     type(model(x).grad_fn).__name__
    '_NormBackward'
    """
    normed = any(isinstance(module, _BatchNorm) for module in model.modules())
    return _QuickNorms() if normed else contextlib.nullcontext()  # a mode slows down every operation a little


class _QuickNorms(TorchFunctionMode):
    """Mode that replaces `torch.nn.functional.batch_norm`, which the modules call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is functional.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, whose parameters these are."""
    own = running_mean, running_var, weight, bias
    moving = any(value is not None and value.requires_grad for value in own)
    if training or running_var is None or moving or type(input) is not Tensor or not torch.is_grad_enabled():
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        scale = (running_var.to(torch.promote_types(running_var.dtype, torch.float32)) + eps).rsqrt()
        scale = scale if weight is None else scale * weight
    output: Tensor = _Norm.apply(input, scale, *own, eps)  # type: ignore[no-untyped-call]
    return output


class _Norm(torch.autograd.Function):
    """A batch norm with fixed statistics, and the factor of every channel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, scale: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:  # noqa: ARG004
        return functional.batch_norm(values, mean, var, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        product = gradient * scale.view(-1, *[1] * (gradient.ndim - 2))
        return product.to(gradient.dtype), *[None] * 6
