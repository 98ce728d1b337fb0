"""Factored layers, which replace one layer of a model by a product of smaller ones.

A layer is replaced in place: the object, its hooks and its attributes stay, its class and its weights change. A
factored layer is an `nn.Sequential` with named members, so its state dict reads ``fc.reduce.weight``,
``fc.expand.weight``, ``fc.expand.bias``. The members' weights are the factors of a `Factorisation`, in its order, so
that they can be folded back into one dense layer at any time.

The stride, padding and dilation of a convolution follow its kernel: all of them belong to ``reduce`` or to a Tucker
``core``, the vertical ones to ``vertical`` and the horizontal ones to ``horizontal``. Only the last layer has a bias,
so that padding between the layers is correct: the first layers map zeros to zeros and copies to copies, as if their
input had been padded.
"""

from collections import OrderedDict
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from qcompress.model.modes import outside_modes
from qcompress.transforms import activations
from qcompress.transforms.low_rank.forms import Channels, Factorisation, Factors, Spatial
from qcompress.transforms.low_rank.tucker import Tucker
from qcompress.transforms.low_rank.words import Words

Model = TypeVar("Model", bound=nn.Module)


class GroupedLinear(nn.Module):
    """A Linear layer without bias whose inputs and outputs are divided into separate groups.

    ``weight`` is ``(out, in / groups)``, with the groups stacked.

    >>> GroupedLinear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), groups=2)(torch.ones(1, 4))
    tensor([[3., 7.]], grad_fn=...)
    """

    def __init__(self, weight: Tensor, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """``(…, in)`` → ``(…, out)``."""
        blocks = self.weight.view(self.groups, -1, self.weight.shape[1])
        return torch.einsum("...gi,goi->...go", input.reshape(*input.shape[:-1], self.groups, -1), blocks).flatten(-2)

    def extra_repr(self) -> str:
        """Describe the layer like a grouped convolution."""
        rows, columns = self.weight.shape
        return f"in_features={columns * self.groups}, out_features={rows}, groups={self.groups}"


class Basis(nn.Module):
    """Map the codes of a word to its features. ``weight`` is ``(rank, features)``.

    >>> Basis(torch.tensor([[1.0, 2.0, 3.0]]))(torch.tensor([[10.0]]))
    tensor([[10., 20., 30.]], grad_fn=...)
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(…, rank)`` → ``(…, features)``."""
        return x @ self.weight

    def extra_repr(self) -> str:
        """Describe the layer like a Linear layer."""
        return f"rank={self.weight.shape[0]}, features={self.weight.shape[1]}"


class DenseWeight(Tensor):
    """The weight of a layer that has no such parameter.

    It is a separate type because PyTorch's fused kernels (such as in `nn.TransformerEncoderLayer`) bypass the layer and
    use its weight, but only if this is a plain tensor. Results computed from it are plain tensors.

    >>> weight = torch.ones(2, 2).as_subclass(DenseWeight)
    >>> type(torch.ones(1, 2) @ weight.T), type(weight)
    (<class 'torch.Tensor'>, <class 'qcompress.compressed.factored.DenseWeight'>)
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as on a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Foldable(nn.Module):
    """A module that replaces one dense layer and can be converted back to it.

    Attributes:
        own_buffers: names of the buffers that the dense layer does not have.
    """

    own_buffers: ClassVar[tuple[str, ...]] = ()

    def to_dense(self) -> nn.Module:
        """Return the dense layer."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense layer's weight, computed on every access and without gradient, for code that reads it."""
        whole: Tensor = self.to_dense().weight.detach()  # type: ignore[operator]
        return whole.as_subclass(DenseWeight)


class Factored(nn.Sequential, Foldable):
    """Smaller layers that replace one layer; the last of them has its bias."""

    @property
    def bias(self) -> Tensor | None:
        """Bias of the last layer."""
        return getattr(self[-1], "bias", None)

    @property
    def factors(self) -> Factors:
        """The members' weights as rows, by name."""
        return {name: layer.weight.detach().flatten(1) for name, layer in self.named_children()}  # type: ignore[operator]

    def _product(self, form: Factorisation, kernel: tuple[int, int]) -> Tensor:
        """Return the rows of the dense weight, computed in float32 or wider."""
        wide = {
            name: factor.to(torch.promote_types(factor.dtype, torch.float32)) for name, factor in self.factors.items()
        }
        return form.product(wide, kernel)

    def _dense_conv(self, form: Factorisation, tall: nn.Conv2d, wide: nn.Conv2d) -> nn.Conv2d:
        """Return the Conv2d whose kernel has the height of one member's and the width of another's."""
        rows = self._product(form, (tall.kernel_size[0], wide.kernel_size[1]))
        first, last = self[0], self[-1]
        dense = _conv(tall, wide, first.in_channels, len(rows))  # type: ignore[arg-type]
        return _filled(dense, rows, last.weight, last.bias)  # type: ignore[arg-type]


class FactoredLinear(Factored):
    """A Linear layer as ``expand(reduce(x))``: features in → rank → features out (with the bias)."""

    reduce: nn.Linear | GroupedLinear
    expand: nn.Linear

    def to_dense(self) -> nn.Linear:
        """Return one Linear layer with the product as its weight."""
        rows = self._product(Channels(getattr(self.reduce, "groups", 1)), (1, 1))
        return _filled(
            nn.Linear(rows.shape[1], rows.shape[0], device="meta"), rows, self.expand.weight, self.expand.bias
        )


class FactoredConv2d(Factored):
    """A Conv2d layer as ``expand(reduce(x))``: its kernel to rank channels, then 1×1 to all (with the bias)."""

    reduce: nn.Conv2d
    expand: nn.Conv2d

    def to_dense(self) -> nn.Conv2d:
        """Return one Conv2d layer with the product as its weight."""
        return self._dense_conv(Channels(self.reduce.groups), self.reduce, self.reduce)


class SpatialConv2d(Factored):
    """A Conv2d layer as ``horizontal(vertical(x))``: kernel columns to rank channels, then kernel rows to all."""

    vertical: nn.Conv2d
    horizontal: nn.Conv2d

    def to_dense(self) -> nn.Conv2d:
        """Return one Conv2d layer with the product as its weight."""
        return self._dense_conv(Spatial(), self.vertical, self.horizontal)


class TuckerConv2d(Factored):
    """A Conv2d layer as ``expand(core(reduce(x)))``: 1×1 to fewer channels, the kernel, 1×1 to all."""

    reduce: nn.Conv2d
    core: nn.Conv2d
    expand: nn.Conv2d

    def to_dense(self) -> nn.Conv2d:
        """Return one Conv2d layer with the product as its weight."""
        return self._dense_conv(Tucker(), self.core, self.core)


class FactoredEmbedding(Factored):
    """An Embedding as ``basis(codes(words))``: a lookup of short codes, then one matrix to the features.

    The members are in the order of the matrix product, not of the calls.
    """

    basis: Basis
    codes: nn.Embedding

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (name in nn.Embedding)
        """``(…)`` ids → ``(…, features)``."""
        features: Tensor = self.basis(self.codes(input))
        return features

    def to_dense(self) -> nn.Embedding:
        """Return one Embedding with the product as its weight."""
        rows = self._product(Words(), (1, 1))
        return _filled(_embedding(self.codes, rows.shape[1]), rows, self.codes.weight, None)


_CONVOLUTIONS: dict[tuple[str, ...], tuple[type[Factored], str, str]] = {
    ("reduce", "expand"): (FactoredConv2d, "reduce", "reduce"),
    ("vertical", "horizontal"): (SpatialConv2d, "vertical", "horizontal"),
    ("reduce", "core", "expand"): (TuckerConv2d, "core", "core"),
}  # names of the factors → class, member with the kernel's height, member with its width


def factored(layer: nn.Module, factors: Factors) -> Factored:
    """Return the layer as smaller ones, with its bias, device, dtype, mode and ``requires_grad``.

    Args:
        layer: a Linear, Embedding, or ungrouped Conv2d layer.
        factors: factors of one of the forms in `qcompress.transforms.low_rank.forms`; their names determine which.

    Raises:
        TypeError: the layer is of another type.

    >>> factored(nn.Linear(8, 4), {"reduce": torch.ones(2, 8), "expand": torch.ones(4, 2)})
    FactoredLinear(
      (reduce): Linear(in_features=8, out_features=2, bias=False)
      (expand): Linear(in_features=2, out_features=4, bias=True)
    )
    """
    if isinstance(layer, nn.Linear):
        reduce, expand = factors.values()
        groups = layer.in_features // reduce.shape[1]
        narrow: Member = nn.Linear(layer.in_features, len(reduce), bias=False, device="meta")
        if groups > 1:
            narrow = GroupedLinear(reduce, groups)
        wide = nn.Linear(len(reduce), layer.out_features, device="meta")
        whole: Factored = FactoredLinear(
            OrderedDict[str, nn.Module](
                reduce=_filled(narrow, reduce, layer.weight, None),
                expand=_filled(wide, expand, layer.weight, layer.bias),
            )
        )
    elif isinstance(layer, nn.Embedding) and list(factors) == ["basis", "codes"]:
        basis, codes = factors.values()
        whole = FactoredEmbedding(
            OrderedDict[str, nn.Module](
                basis=_filled(Basis(torch.empty(basis.shape, device="meta")), basis, layer.weight, None),
                codes=_filled(_embedding(layer, codes.shape[1]), codes, layer.weight, None),
            )
        )
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
        kind, tall, broad = _CONVOLUTIONS[tuple(factors)]
        members, inputs = OrderedDict[str, nn.Module](), layer.in_channels
        for name, rows in factors.items():
            empty = _conv(layer if name == tall else None, layer if name == broad else None, inputs, len(rows), rows)
            members[name] = _filled(empty, rows, layer.weight, layer.bias if len(members) + 1 == len(factors) else None)
            inputs = len(rows)
        whole = kind(members)
    else:
        names = ", ".join(factors)
        raise TypeError(f"only Linear, Embedding and ungrouped Conv2d can be factored; found {names} of {layer}")
    return whole.train(layer.training)


@outside_modes
def fold_(model: Model) -> Model:
    """Replace factored layers by dense ones, in place, so that the original state dict loads again.

    Layers no longer round their activations. An Embedding in blocks (`qcompress.vocabulary`) becomes one layer again.

    >>> factors = {"reduce": torch.ones(2, 8), "expand": torch.ones(4, 2)}
    >>> fold_(nn.Sequential(factored(nn.Linear(8, 4), factors)))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    for module in reversed(list(model.modules())):  # inner modules first
        activations.detach(module)
        if isinstance(module, Foldable):
            replace_(module, module.to_dense())
    return model


def replace_(layer: nn.Module, other: nn.Module) -> None:
    """Turn a layer into ``other``, in place: it stays the same object and keeps its hooks, attributes and mode.

    So whatever refers to the layer, such as a plain list, runs ``other`` as well.

    Args:
        layer: a dense layer without modules of its own, or a `Foldable` in place of one.
        other: what it becomes; its weights are shared.
    """
    layer._modules.clear()
    for name in ("weight", "bias"):
        layer._parameters.pop(name, None)
    for name in getattr(layer, "own_buffers", ()):
        layer._buffers.pop(name)
    for name, value in vars(other).items():
        if name in ("_parameters", "_buffers", "_modules"):
            vars(layer)[name].update(value)
        else:
            vars(layer).setdefault(name, value)
    layer.__class__ = type(other)


def _conv(
    tall: nn.Conv2d | None, wide: nn.Conv2d | None, inputs: int, outputs: int, rows: Tensor | None = None
) -> nn.Conv2d:
    """Return an empty Conv2d that has the vertical settings of ``tall`` and the horizontal ones of ``wide``.

    None stands for size and stride 1. The number of groups follows from the length of ``rows``.
    """

    def both(name: str, otherwise: int) -> tuple[int, int]:
        return (
            otherwise if tall is None else getattr(tall, name)[0],
            otherwise if wide is None else getattr(wide, name)[1],
        )

    kernel, either = both("kernel_size", 1), tall or wide
    padding = either.padding if either is not None and isinstance(either.padding, str) else both("padding", 0)
    return nn.Conv2d(
        inputs,
        outputs,
        kernel,
        stride=both("stride", 1),
        padding=padding,
        dilation=both("dilation", 1),
        groups=1 if rows is None else inputs * kernel[0] * kernel[1] // rows.shape[1],
        padding_mode="zeros" if either is None else either.padding_mode,
        device="meta",
    )


def _embedding(like: nn.Embedding, features: int) -> nn.Embedding:
    """Return an empty Embedding with as many words as ``like``."""
    return nn.Embedding(
        like.num_embeddings,
        features,
        padding_idx=like.padding_idx,
        scale_grad_by_freq=like.scale_grad_by_freq,
        sparse=like.sparse,
        device="meta",
    )


Member = nn.Linear | nn.Conv2d | GroupedLinear | Basis | nn.Embedding
Layer = TypeVar("Layer", bound=Member)


def _filled(empty: Layer, rows: Tensor, like: Tensor, bias: Tensor | None) -> Layer:
    """Return ``empty`` with ``rows`` as its weight, in the type and device of ``like``, and the given bias parameter.

    Layers are created empty (on the meta device) so that no random numbers are drawn.
    """
    value = rows.detach().reshape(empty.weight.shape).to(device=like.device, dtype=like.dtype, copy=True)
    empty.weight = nn.Parameter(value, requires_grad=like.requires_grad)
    empty._parameters["bias"] = bias  # type: ignore[assignment]
    return empty
