"""Fold batch norms into the preceding layers, so that a layer's output is what the next layer reads.

This is needed for rounding activations to 8 bits: the output channels of a convolution differ in magnitude, and only
the batch norm after it makes them similar.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qcompress.compressed.copying import own_copy
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.alone import same_outputs
from qcompress.model.modes import outside_modes

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@outside_modes
def fold_batch_norms(model: nn.Module, example: Any, *, forward: forwards.Forward | None = None) -> nn.Module:
    """Return a copy of ``model`` with batch norms folded into the layers before them, in evaluation mode.

    A batch norm is folded if its input is the output of one plain convolution or Linear layer, both are called once,
    and the outputs of the model do not change.

    Args:
        model: the model; it is not modified.
        example: a batch.
        forward: ``(model, batch) -> output tensor``, for models that the default does not fit.

    Raises:
        ModelError: the model cannot be copied.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    >>> fold_batch_norms(model, torch.randn(2, 3, 8, 8))
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
    )
    """
    folded = own_copy(model).eval()
    with torch.no_grad(), forwards.evaluating(folded):
        with forwards.first_pass(example, "the example"):
            expected = forwards.run(folded, example, forward)
        for path, source in _pairs(folded, example, forward).items():
            norm, layer = folded.get_submodule(path), folded.get_submodule(source)
            before = layers.weight_of(layer).detach().clone(), layer.bias
            _put(folded, path, nn.Identity())
            _fold(layer, norm)
            if not same_outputs(folded, forwards.run(folded, example, forward), expected):
                layers.weight_of(layer).copy_(before[0])
                layer.bias = before[1]
                _put(folded, path, norm)
    return folded


def _pairs(model: nn.Module, example: Any, forward: forwards.Forward | None) -> dict[str, str]:
    """Path of a batch norm → path of the layer whose output it receives, for those called once."""
    paths = {module: path for path, module in model.named_modules()}
    given: dict[int, tuple[str, Tensor]] = {}  # id of an output → its layer, and the output to keep it alive
    calls: dict[str, int] = {}
    layers_before: dict[str, str] = {}

    def after(module: nn.Module, args: Any, output: Tensor) -> None:  # noqa: ARG001
        calls[paths[module]] = calls.get(paths[module], 0) + 1
        given[id(output)] = paths[module], output

    def before(module: nn.Module, args: Any) -> None:
        calls[paths[module]] = calls.get(paths[module], 0) + 1
        if args and id(args[0]) in given:
            layers_before[paths[module]] = given[id(args[0])][0]

    hooks = [
        module.register_forward_hook(after)
        for module in model.modules()
        if isinstance(module, (nn.Linear, *layers.CONVOLUTIONS)) and not layers.why_unsupported(module)
    ]
    hooks += [module.register_forward_pre_hook(before) for module in model.modules() if _is_fixed(module)]
    try:
        forwards.run(model, example, forward)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: layer for norm, layer in layers_before.items() if calls[norm] == calls[layer] == 1}


def _is_fixed(module: nn.Module) -> bool:
    """Whether it is a batch norm of PyTorch with running statistics."""
    return type(module) in NORMS and getattr(module, "running_mean", None) is not None


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Change a layer so that it computes the output of the batch norm after it."""
    held = {name: tensor for name, tensor in norm.state_dict().items() if tensor is not None}
    weight = layers.weight_of(layer)
    gain = (held["running_var"].double() + norm.eps).rsqrt() * held.get("weight", torch.ones(())).double()
    bias = torch.zeros_like(gain) if layer.bias is None else layer.bias.double()
    shift = (bias - held["running_mean"].double()) * gain + held.get("bias", torch.zeros(())).double()
    weight.copy_(weight.double() * gain.reshape(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
