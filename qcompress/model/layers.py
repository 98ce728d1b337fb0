"""The supported layers: how to view a weight as rows of output channels, and what a layer costs.

A layer is supported if its output is linear in one plain ``weight`` parameter. Everything that depends on the type of
layer is in this module; the rest of the package only sees rows ``(channels, weights per channel)``.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)
INPUTS_FIRST = ("transformers.pytorch_utils.Conv1D",)
"""Linear layers of other packages with a weight ``(in, out)``, by name so that none has to be imported."""


def why_unsupported(module: nn.Module) -> str:
    """Return why the weight of ``module`` cannot be compressed, or an empty string."""
    if kind_of(module) is None:
        return f"{type(module).__name__} is not supported"
    if module._parameters.get("weight") is None:
        return "its weight is computed (parametrised or lazy), not a plain parameter"
    weight = weight_of(module)
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight is not initialised yet; run the model once first"
    if why := why_no_numbers(weight):
        return why
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return f"an {kind_name(module)} with max_norm changes its weight when it runs"
    return ""


def why_no_numbers(weight: Tensor) -> str:
    """Return why a weight's type has no options, or an empty string.

    >>> why_no_numbers(torch.zeros(1, dtype=torch.float8_e5m2))
    'its weight holds torch.float8_e5m2, which PyTorch stores but does not compute with'
    """
    if not weight.is_floating_point():
        return f"its weight holds {weight.dtype}, not floating-point numbers"
    if weight.dtype.itemsize < 2:  # scales, if there are any, are elsewhere in the model
        return f"its weight holds {weight.dtype}, which PyTorch stores but does not compute with"
    return ""


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the supported class that a layer is an instance of; None if its output is not linear in its weight.

    >>> kind_of(nn.EmbeddingBag(2, 2)), kind_of(nn.EmbeddingBag(2, 2, mode="max"))
    (<class 'torch.nn.modules.sparse.EmbeddingBag'>, None)
    """
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return None
    return next((kind for kind in type(module).__mro__ if kind in SUPPORTED or _inputs_first(kind)), None)


def kind_name(module: nn.Module) -> str:
    """Return a layer's name in options and files: its supported class if it computes like it, else its own class."""
    kind = kind_of(module)
    return (kind if kind is not None and is_plain(module) else type(module)).__name__


def has_inputs_first(module: nn.Module) -> bool:
    """Whether the layer's weight is ``(in, out)``."""
    kind = kind_of(module)
    return kind is not None and _inputs_first(kind)


def is_by_rows(module: nn.Module) -> bool:
    """Whether the layer's weight is the rows themselves, so that `to_rows` neither turns nor reshapes it.

    >>> is_by_rows(nn.Linear(2, 3)), is_by_rows(nn.Conv1d(2, 3, 1))
    (True, False)
    """
    return weight_of(module).ndim == 2 and not has_inputs_first(module)


def makes_second_dimension(module: nn.Module) -> bool:
    """Whether a layer's outputs are along dimension 1 of its weight; of a table, its columns.

    >>> makes_second_dimension(nn.ConvTranspose1d(2, 3, 1)), makes_second_dimension(nn.Linear(2, 3))
    (True, False)
    """
    return isinstance(module, (*TRANSPOSED, nn.Embedding, nn.EmbeddingBag)) or has_inputs_first(module)


def _inputs_first(kind: type) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in INPUTS_FIRST


def is_plain(module: nn.Module) -> bool:
    """Whether the layer computes like PyTorch's layer of its kind, whatever its class is called."""
    layer_type, kind = type(module), kind_of(module)
    inherited = all(
        getattr(layer_type, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
    )
    return inherited and "forward" not in vars(module)


def weight_of(module: nn.Module) -> nn.Parameter:
    """Return the weight of a supported layer."""
    weight = module._parameters["weight"]
    assert weight is not None  # noqa: S101
    return weight


def to_rows(module: nn.Module, weight: Tensor, groups: int | None = None) -> Tensor:
    """Return the weight as ``(channels, weights per channel)``; channels are output channels or vocabulary entries.

    Args:
        module: the layer.
        weight: its weight.
        groups: its groups, if it had another number of them when the weight was of this shape.
    """
    if isinstance(module, TRANSPOSED):
        groups, (inputs, outputs, *kernel) = groups or module.groups, weight.shape
        grouped = weight.reshape(groups, inputs // groups, outputs, *kernel)
        return grouped.transpose(1, 2).reshape(groups * outputs, -1)
    if has_inputs_first(module):
        return weight.t()
    return weight.reshape(weight.shape[0], -1)


def from_rows(module: nn.Module, rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_rows`: rows → weight of ``shape``."""
    if isinstance(module, TRANSPOSED):
        inputs, outputs, *kernel = shape
        grouped = rows.reshape(module.groups, outputs, inputs // module.groups, *kernel)
        return grouped.transpose(1, 2).reshape(shape)
    if has_inputs_first(module):
        return rows.t()
    return rows.reshape(shape)


def same_rows(modules: Iterable[nn.Module]) -> bool:
    """Whether all modules read a shared weight as the same rows; transposed layers read it differently.

    >>> same_rows([nn.Linear(4, 4), nn.Embedding(4, 4)]), same_rows([nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)])
    (True, False)
    """
    return (
        len(
            {
                -1 if has_inputs_first(module) else module.groups if isinstance(module, TRANSPOSED) else 0
                for module in modules
            }
        )
        <= 1
    )


def num_channels(module: nn.Module) -> int:
    """Return the number of rows that `to_rows` returns."""
    if isinstance(module, TRANSPOSED):
        return int(module.out_channels)
    return weight_of(module).shape[1 if has_inputs_first(module) else 0]


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """Return the dimension of the layer's output that holds its channels (for embeddings, -1: the features)."""
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return output.ndim - 1 - len(module.kernel_size)
    return output.ndim - 1


def macs_of_call(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Multiply-accumulates of one call (all samples); 0 for embeddings, which only look up."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 0
    weights = weight_of(module).numel()
    if isinstance(module, TRANSPOSED):
        return inputs.numel() * weights // module.in_channels
    return output.numel() * weights // num_channels(module)
