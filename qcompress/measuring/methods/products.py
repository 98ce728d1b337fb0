"""Products of gradients with changes of a layer's output, separately for every sample.

A `Place` says which values of a layer's output belong to which sample. Usually the samples lie along one dimension;
tokens gathered from many samples, as in a mixture of experts, have an owner each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.measuring.methods.calls import Call
from qcompress.model import layers

STACKED = 1 << 20
"""Numbers of responses and gradients that are multiplied at once, few enough to stay in the processor's cache."""

STACKED_THERE = 1 << 26
"""The same on an accelerator, where few large operations are fast."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the samples are in a layer's output.

    Attributes:
        dim: the dimension that the samples lie along (possibly with several entries per sample, in order), if any.
        owner: otherwise ``(positions,)`` the sample of every position; positions are all dimensions but the channels.
    """

    dim: int | None = None
    owner: Tensor | None = None


def shares(
    call: Call, gradients: list[Tensor], responses: list[Tensor], place: Place, num_samples: int, starts: list[int]
) -> Tensor:
    """Return ``(responses, parts, samples, gradients)``: products of one call's responses and gradients, part by part.

    Args:
        call: a call of the layer.
        gradients: gradients of the call's output, one per probe.
        responses: changes of the call's output.
        place: where the samples are in the output.
        num_samples: number of samples in the batch.
        starts: first row of every part of the weight, in order.
    """
    gradients, responses = [wide(value) for value in gradients], [wide(value) for value in responses]
    if place.owner is not None:
        return torch.stack(
            [_by_owner(call, gradients, response, place.owner, num_samples, starts) for response in responses]
        )
    assert place.dim is not None  # noqa: S101
    if len(starts) == 1:
        return _whole(gradients, responses, place.dim, num_samples)[:, None]
    split = _by_vocabulary if isinstance(call.module, nn.Embedding) else _by_channel
    return torch.stack([split(call, gradients, response, place.dim, num_samples, starts) for response in responses])


def wide(values: Tensor) -> Tensor:
    """Convert to at least float32, for sums of many products that would underflow in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def together_on(device: torch.device) -> int:
    """Return how many numbers of responses and gradients are multiplied at once on a device."""
    return STACKED if device.type == "cpu" else STACKED_THERE


def _whole(gradients: list[Tensor], responses: list[Tensor], dim: int, num_samples: int) -> Tensor:
    """Return the products of all responses and gradients per sample: ``(responses, samples, gradients)``."""
    others = [other for other in range(gradients[0].ndim) if other != dim]
    order = [dim, *sorted(others, key=lambda other: -gradients[0].stride()[other])]  # memory order avoids copies
    left, right = (
        [value.permute(order).reshape(num_samples, -1) for value in values] for values in (responses, gradients)
    )
    products = left[0].new_zeros(num_samples, len(left), len(right))
    numbers, together = left[0].shape[1], together_on(left[0].device) // (len(left) + len(right))
    size, step = max(1, min(numbers, together)), max(1, together // max(numbers, 1))
    for first in range(0, num_samples, step):
        for start in range(0, numbers, size):
            block = slice(first, first + step), slice(start, start + size)
            stacks = [torch.stack([value[block] for value in side], dim=1) for side in (left, right)]
            products[first : first + step].baddbmm_(stacks[0], stacks[1].mT)
    return products.transpose(0, 1)


def _by_channel(
    call: Call, gradients: list[Tensor], response: Tensor, dim: int, num_samples: int, starts: list[int]
) -> Tensor:
    """Return the products split by the parts that the output's channels belong to: ``(parts, samples, gradients)``."""
    channels = layers.channel_dim(call.module, response)

    def channels_first(values: Tensor) -> Tensor:
        moved = values.movedim((channels, dim), (0, 1))
        return moved.reshape(moved.shape[0], num_samples, -1)

    right = channels_first(response)
    per_channel = torch.stack([(channels_first(value) * right).sum(-1) for value in gradients], dim=-1)
    part = _part_of(torch.arange(len(per_channel), device=response.device), starts)
    return per_channel.new_zeros(len(starts), *per_channel.shape[1:]).index_add_(0, part, per_channel)


def _by_vocabulary(
    call: Call, gradients: list[Tensor], response: Tensor, dim: int, num_samples: int, starts: list[int]
) -> Tensor:
    """Return the products split by the parts that the looked-up entries belong to: ``(parts, samples, gradients)``."""

    def by_sample(values: Tensor) -> Tensor:
        return values.movedim(dim, 0).reshape(num_samples, -1)

    part = by_sample(_part_of(_words(call), starts))
    products = torch.stack([by_sample((value * response).sum(-1)) for value in gradients], dim=-1)
    sample = torch.arange(num_samples, device=part.device)[:, None].expand_as(part)
    share = response.new_zeros(len(starts), num_samples, len(gradients))
    return share.index_put_((part, sample), products, accumulate=True)


def _by_owner(
    call: Call, gradients: list[Tensor], response: Tensor, owner: Tensor, num_samples: int, starts: list[int]
) -> Tensor:
    """The products where every position has an owner: ``(parts, samples, gradients)``."""
    channels = layers.channel_dim(call.module, response)

    def by_position(values: Tensor) -> Tensor:
        return values.movedim(channels, -1).reshape(len(owner), -1)

    right = by_position(response)
    products = torch.stack([by_position(value) * right for value in gradients], dim=-1)  # (positions, channels, probes)
    share = response.new_zeros(len(starts), num_samples, len(gradients))
    if isinstance(call.module, nn.Embedding):
        part = _part_of(_words(call).flatten(), starts)
        return share.index_put_((part, owner), products.sum(1), accumulate=True)
    part = _part_of(torch.arange(right.shape[1], device=owner.device), starts)
    per_part = products.new_zeros(len(starts), len(owner), len(gradients)).index_add_(0, part, products.movedim(1, 0))
    return share.index_add_(1, owner, per_part)


def _words(call: Call) -> Tensor:
    words: Tensor = call.args[0] if call.args else call.kwargs["input"]
    return words


def _part_of(rows: Tensor, starts: list[int]) -> Tensor:
    return torch.bucketize(rows, torch.tensor(starts[1:], device=rows.device), right=True)
