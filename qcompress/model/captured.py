"""What a layer's weight is really multiplied with, where the layer's class computes something of its own around it.

A subclass may pad its input first, as the convolutions of some image models do, or scale it. The product itself is
still one call of PyTorch's function with the layer's weight; it is caught there.
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
        input: what it is multiplied with.
        stride, padding, dilation, groups: of a convolution; numbers, tuples, or a padding's name.
    """

    input: Tensor
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


def products_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Product]:
    """The products with the weight itself in a run of ``module.forward``, which has no hooks.

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
