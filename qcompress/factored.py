"""Layers that stand for one layer by the product of smaller ones, and how they take its place in a model.

A factored layer is an `nn.Sequential` with named members, so its state dict reads ``fc.reduce.weight``,
``fc.expand.weight``, ``fc.expand.bias``. It can be folded back to one dense layer at any time.
"""

from collections import OrderedDict
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class FactoredLinear(nn.Sequential):
    """A Linear layer as ``expand(reduce(x))``: features in → rank → features out (with the bias)."""

    reduce: nn.Linear
    expand: nn.Linear

    def __init__(self, reduce: nn.Linear, expand: nn.Linear) -> None:
        super().__init__(OrderedDict(reduce=reduce, expand=expand))

    def to_dense(self) -> nn.Linear:
        """One Linear layer with the product as its weight."""
        dense = nn.Linear(self.reduce.in_features, self.expand.out_features, device="meta")
        return _filled(dense, self.expand.weight.detach() @ self.reduce.weight.detach(), self.expand)


class FactoredConv2d(nn.Sequential):
    """A Conv2d layer as ``expand(reduce(x))``: its own kernel to rank channels, then 1×1 to all (with the bias)."""

    reduce: nn.Conv2d
    expand: nn.Conv2d

    def __init__(self, reduce: nn.Conv2d, expand: nn.Conv2d) -> None:
        super().__init__(OrderedDict(reduce=reduce, expand=expand))

    def to_dense(self) -> nn.Conv2d:
        """One Conv2d layer with the product as its weight."""
        weight = torch.einsum("or,rikl->oikl", self.expand.weight.detach()[:, :, 0, 0], self.reduce.weight.detach())
        return _filled(_conv_like(self.reduce, weight.shape[1], weight.shape[0]), weight, self.expand)


Factored = FactoredLinear | FactoredConv2d


def factored(layer: nn.Module, factors: tuple[Tensor, ...]) -> Factored:
    """The layer as two, with its bias, device, dtype, mode and ``requires_grad``.

    Args:
        layer: Linear, or Conv2d without groups; its rows are ``(m, n)``.
        factors: ``reduce (rank, n)`` and ``expand (m, rank)``.

    >>> factored(nn.Linear(8, 4), (torch.ones(2, 8), torch.ones(4, 2)))
    FactoredLinear(
      (reduce): Linear(in_features=8, out_features=2, bias=False)
      (expand): Linear(in_features=2, out_features=4, bias=True)
    )
    """
    reduce, expand = factors
    rank = len(reduce)
    whole: Factored
    if isinstance(layer, nn.Linear):
        narrow = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        wide = nn.Linear(rank, layer.out_features, device="meta")
        whole = FactoredLinear(_filled(narrow, reduce, None, like=layer), _filled(wide, expand, layer))
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        kernels = reduce.view(rank, *layer.weight.shape[1:])
        point = nn.Conv2d(rank, layer.out_channels, 1, device="meta")
        whole = FactoredConv2d(
            _filled(_conv_like(layer, layer.in_channels, rank), kernels, None, like=layer),
            _filled(point, expand.view(-1, rank, 1, 1), layer),
        )
    else:
        raise TypeError(f"only Linear, and Conv2d without groups, can be factored, found {layer}")
    return whole.train(layer.training)


def fold_(model: Model) -> Model:
    """Put dense layers in the place of factored ones, in place, so that the original state dict loads again.

    >>> model = nn.Sequential(factored(nn.Linear(8, 4), (torch.ones(2, 8), torch.ones(4, 2))))
    >>> fold_(model)
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    for module in list(model.modules()):
        if isinstance(module, Factored):
            replace_(model, module, module.to_dense().train(module.training))
    return model


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is a child of a module in ``model``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _conv_like(layer: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    """An empty Conv2d that moves over its input as ``layer`` does."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        padding_mode=layer.padding_mode,
        device="meta",
    )


Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def _filled(
    empty: Layer, weight: Tensor, bias_of: nn.Linear | nn.Conv2d | None, *, like: nn.Linear | nn.Conv2d | None = None
) -> Layer:
    """``empty`` with a weight like that of ``like`` and the very bias parameter of ``bias_of``.

    Layers are made empty (on the meta device) so that making them draws no random numbers.
    """
    model = like if bias_of is None else bias_of
    assert model is not None  # noqa: S101
    value = weight.detach().to(device=model.weight.device, dtype=model.weight.dtype, copy=True)
    empty.weight = nn.Parameter(value, requires_grad=model.weight.requires_grad)
    empty.bias = None if bias_of is None else bias_of.bias  # type: ignore[assignment]
    return empty
