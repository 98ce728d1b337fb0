"""Modules that have nothing left to compute, such as attention without heads, are replaced by their constant output."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model.coupled import Bypass

LAYER_INDEX = "layer_idx"
"""Attribute of transformers' attention layers: the place of their keys and values in the cache."""


class Bypassed(nn.Module):
    """Constant output in place of a module.

    Args:
        bias: ``(width,)`` bias that is the output at every position, or None.
        width: 0 if the output is empty; None for zeros of the input's shape. Irrelevant with a bias.
        outputs: see `Bypass`.
        after: number of dimensions after the bias's, such as those of an image.

    >>> import torch
    >>> Bypassed(nn.Parameter(torch.ones(2)))(torch.randn(1, 3, 8)).shape
    torch.Size([1, 3, 2])
    """

    bias: nn.Parameter | None

    def __init__(
        self, bias: nn.Parameter | None, *, width: int | None = None, outputs: int | None = None, after: int = 0
    ) -> None:
        super().__init__()
        self.width, self.outputs, self.after = width, outputs, after
        self.register_parameter("bias", bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the constant for every position of the first argument with floating-point numbers."""
        given = first_floating(args, kwargs)
        if self.bias is not None:
            before, behind = given.shape[: given.ndim - self.after - 1], given.shape[given.ndim - self.after :]
            output = self.bias.view(-1, *[1] * self.after).expand(*before, -1, *behind).clone()
        elif self.width is None:
            output = torch.zeros_like(given)
        else:
            output = given.new_zeros(*given.shape[:-1], self.width)
        return output if self.outputs is None else (output, *[None] * (self.outputs - 1))

    def extra_repr(self) -> str:
        """Return what the output is."""
        return f"{len(self.bias)} biases" if self.bias is not None else "zero" if self.width is None else "empty"


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

    Later attention layers move up in the cache of keys and values, because its length is read at the first place.
    """
    for bypass in bypasses:
        reader = None if bypass.reader is None else model.get_submodule(bypass.reader)
        bias = None if reader is None else reader.bias
        assert bias is None or isinstance(bias, nn.Parameter)  # noqa: S101
        width = 0 if reader is None else None
        after = len(reader.kernel_size) if isinstance(reader, nn.modules.conv._ConvNd) else 0
        replacement = Bypassed(bias, width=width, outputs=bypass.outputs, after=after)
        model.set_submodule(bypass.path, replacement.train(model.get_submodule(bypass.path).training))
    if bypasses and not caches_differ(model):
        _move_up(model)


def caches_differ(model: nn.Module) -> bool:
    """Whether the places in the cache of keys and values differ in kind, so that layers cannot move up."""
    return len(set(getattr(getattr(model, "config", None), "layer_types", None) or ())) > 1


def caching(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have a place in the cache, by path."""
    return {path: module for path, module in model.named_modules() if type(getattr(module, LAYER_INDEX, None)) is int}


def _move_up(model: nn.Module) -> None:
    """Renumber the places in the cache, separately for self-attention and for attention to an encoder."""
    alike: dict[str, list[nn.Module]] = {}
    for path, module in caching(model).items():
        alike.setdefault(re.sub(r"[0-9]+", "", path), []).append(module)
    for modules in alike.values():
        places = {old: new for new, old in enumerate(sorted({getattr(module, LAYER_INDEX) for module in modules}))}
        for module in modules:
            setattr(module, LAYER_INDEX, places[getattr(module, LAYER_INDEX)])


def held_by(bypasses: Sequence[Bypass], name: str) -> bool:
    """Whether a tensor or module of this name is in a module that is bypassed."""
    return any(bypass.holds(name) for bypass in bypasses)


def name_after(bypasses: Sequence[Bypass], name: str) -> str | None:
    """Return the name that a tensor has once modules are bypassed, or None if it is gone."""
    for bypass in bypasses:
        if bypass.holds(name):
            return f"{bypass.path}.bias" if bypass.reader and name == f"{bypass.reader}.bias" else None
    return name
