"""Capture the actual input of a layer's product, for layer classes that transform it before multiplying.

A subclass may pad or scale its input first, as the convolutions of some image models do. The product itself is still
one call of PyTorch's function with the layer's weight, where it is intercepted.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcompress.model import layers

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES: dict[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
}


@dataclass(frozen=True, slots=True)
class Product:
    """One product with a layer's weight.

    Attributes:
        input: the input that the weight is multiplied with.
        stride, padding, dilation, groups: arguments of a convolution: numbers, tuples, or the name of a padding mode.
    """

    input: Tensor
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


def products_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Product]:
    """Return the products with the weight in a run of ``module.forward``, without hooks.

    >>> class Doubling(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(2 * x)
    >>> products_of(Doubling(1, 1), (torch.ones(1, 1),), {})[0].input
    tensor([[2.]])
    """
    catching = _Catching(layers.weight_of(module))
    with torch.no_grad(), catching:
        module.forward(*args, **kwargs)
    return catching.found


class _Catching(TorchFunctionMode):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.found: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NAMES:
            given = dict(zip(_NAMES[func], args, strict=False)) | kwargs
            if given["weight"] is self._weight:
                known = ("stride", "padding", "dilation", "groups")
                self.found.append(Product(given["input"], **{name: given[name] for name in known if name in given}))
        return func(*args, **kwargs)
