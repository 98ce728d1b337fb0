"""Modules that have nothing left to compute, such as attention without heads, are replaced by their constant output."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model.coupled import Bypass

LAYER_INDEX = "layer_idx"
"""Attribute of transformers' attention layers: the place of their keys and values in the cache."""


class Bypassed(nn.Module):
    """Constant output in place of a module: zero, or a bias.

    Args:
        bypass: the module that is replaced.
        bias: ``(width,)`` bias that is the output, or None.

    >>> import torch
    >>> Bypassed(Bypass(path="mlp", width=2), nn.Parameter(torch.ones(2)))(torch.randn(1, 3, 8)).shape
    torch.Size([1, 3, 2])
    """

    bias: nn.Parameter | None

    def __init__(self, bypass: Bypass, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.width, self.outputs = bypass.width, bypass.outputs
        self.register_parameter("bias", bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the constant for every position of the first argument with floating-point numbers."""
        given = first_floating(args, kwargs)
        output = given.new_zeros(*given.shape[:-1], self.width)
        if self.bias is not None:
            output = output + self.bias
        return output if self.outputs is None else (output, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """Width of the output."""
        return f"width={self.width}"


def first_floating(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor of floating-point numbers among arguments.

    Raises:
        ModelError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError("a bypassed module was called without floating-point numbers")


def bypass_(model: nn.Module, bypasses: Sequence[Bypass]) -> None:
    """Replace modules by their constant output, in place.

    Attention layers behind them move up in the cache of keys and values, whose first place tells the length.
    """
    for bypass in bypasses:
        bias = None if bypass.reader is None else model.get_submodule(bypass.reader).bias
        assert bias is None or isinstance(bias, nn.Parameter)  # noqa: S101
        replacement = Bypassed(bypass, bias)
        model.set_submodule(bypass.path, replacement.train(model.get_submodule(bypass.path).training))
    if bypasses:
        _move_up(model)


def _move_up(model: nn.Module) -> None:
    """Number the places in the cache anew, unless they differ in kind."""
    caching = [module for module in model.modules() if isinstance(getattr(module, LAYER_INDEX, None), int)]
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    if len(set(kinds)) > 1:
        return
    places = {old: new for new, old in enumerate(sorted({getattr(module, LAYER_INDEX) for module in caching}))}
    for module in caching:
        setattr(module, LAYER_INDEX, places[getattr(module, LAYER_INDEX)])


def held_by(bypasses: Sequence[Bypass], name: str) -> bool:
    """Whether a tensor or module of this name is in a module that is bypassed."""
    return any(bypass.holds(name) for bypass in bypasses)
