"""Products of gradients with what a convolution returns for many changes of its weight.

One convolution computes the responses to all changes of a few samples, with the changes as its output channels. They
come in the order that the products need, are multiplied while they are in the processor's cache, and are dropped.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcompress.measuring.methods.calls import Call, rerun
from qcompress.measuring.methods.products import Place, together_on, wide
from qcompress.model import layers


def fits(call: Call, gradients: Sequence[Tensor], num_changes: int, place: Place) -> bool:
    """Whether `shares_of_changes` computes these products, and fast.

    Args:
        call: a call of the layer.
        gradients: gradients of the call's output, one per probe.
        num_changes: number of changes of the layer's weight.
        place: where the samples are in the output.
    """
    module, given = call.module, call.args[0] if call.args else None
    return (
        isinstance(module, layers.CONVOLUTIONS)
        and layers.is_plain(module)
        and module.groups == 1
        and place.dim == 0
        and isinstance(given, Tensor)
        and len(given) == len(call.output)
        and all(value.is_contiguous() for value in gradients)  # else the responses would have to be rearranged
        and num_changes * layers.weight_of(module).numel() <= together_on(given.device)
    )


def shares_of_changes(call: Call, gradients: Sequence[Tensor], changes: Sequence[Tensor], num_samples: int) -> Tensor:
    """Return products ``(changes, 1, samples, gradients)`` of a call's gradients and responses, as `products.shares`.

    Args:
        call: a call of a convolution, with the samples along the first dimension.
        gradients: gradients of the call's output, one per probe.
        changes: changes of the whole weight.
        num_samples: number of samples in the batch.
    """
    weight, rows = torch.cat(list(changes)), len(call.output) // num_samples
    numbers = call.output[0].numel() * rows * (len(changes) + len(gradients))
    step = max(1, together_on(weight.device) // numbers)
    products = []
    for first in range(0, num_samples, step):
        block = slice(first * rows, (first + step) * rows)
        some = replace(call, args=(call.args[0][block], *call.args[1:]))
        responses = wide(rerun(some, weight, bias=False))
        count = len(responses) // rows
        left = responses.reshape(count, rows, len(changes), -1).transpose(1, 2).reshape(count, len(changes), -1)
        right = wide(torch.stack([value[block].reshape(count, -1) for value in gradients], dim=1))
        products.append(left @ right.mT)
    return torch.cat(products).transpose(0, 1)[:, None]
