"""What MatMulNBits at accuracy level 4 computes: its input is rounded to 8 bits, block by block.

Every block of the weight's group size gets a symmetric scale, its largest absolute value divided by 127, and the
products are exact. So a model whose Linear layers round their inputs in this way gives ONNX Runtime's outputs up to
the order of additions. Blocks of 16 weights in 2 bits are multiplied in float32.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.compressed.record import CompressedPart, record_of
from qcompress.engines import onnx_graph
from qcompress.engines.integer_codes import Scheme, scheme_of
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.integer import IntegerProduct
from qcompress.transforms.quantize.prune_quantize import nonzero

IN_INTEGERS = 4
"""Accuracy level at which inputs are rounded."""

LARGEST = 127


@contextlib.contextmanager
def rounding_inputs(
    model: nn.Module, accuracy_level: int, choice: Iterable[tuple[Part, Transform]] | None = None
) -> Iterator[None]:
    """Let layers that are written as MatMulNBits round their inputs inside the block, as ONNX Runtime does.

    Args:
        model: a compressed model, or a model with the dense weights of a choice.
        accuracy_level: of MatMulNBits; other levels than 4 round nothing.
        choice: the choice, if the model has no record of it. Inputs of low-rank factors are then not rounded.
    """
    if accuracy_level != IN_INTEGERS:
        yield
        return
    record = record_of(model)
    stored = () if record is None else record.parts
    layers = _chosen(choice) if choice is not None else itertools.chain.from_iterable(map(_layers, stored))
    sizes = {
        module: scheme.group_size
        for path, transform, target in layers
        if onnx_graph.is_linear(module := model.get_submodule(path))
        if (scheme := _scheme(transform, target)) is not None
    }
    hooks = [module.register_forward_pre_hook(_rounding(size)) for module, size in sizes.items() if size is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounded_in_blocks(x: Tensor, size: int) -> Tensor:
    """Round the last dimension to 8 bits with a scale for every ``size`` numbers.

    >>> rounded_in_blocks(torch.tensor([127.0, 0.6, -0.4, 63.5, 0.0]), 2).tolist()
    [127.0, 1.0, -0.5, 63.5, 0.0]
    """
    width = x.shape[-1]
    blocks = nn.functional.pad(x.float(), (0, -width % size)).reshape(*x.shape[:-1], -1, size)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = largest / LARGEST
    inverse = torch.full_like(largest, LARGEST) / nonzero(
        largest
    )  # as the engine divides, for inputs between two steps
    return (torch.round(blocks * inverse) * scale).flatten(-2)[..., :width].to(x.dtype)


def _layers(item: CompressedPart) -> Iterator[tuple[str, Transform, Target]]:
    """Yield the layers that compute with a part's weight, and how it is stored; those of both factors at low rank."""
    transform, target = item.transform, item.part.target
    for path in item.part.modules if item.stored else ():
        if isinstance(transform, LowRank):
            for name, factor in transform.factor_targets(target).items():
                yield f"{path}.{name}", transform.then, factor
        else:
            yield path, transform, target


def _chosen(choice: Iterable[tuple[Part, Transform]]) -> Iterator[tuple[str, Transform, Target]]:
    """The layers whose dense weights are those of a choice."""
    for part, transform in choice:
        if not isinstance(transform, LowRank):
            for path in part.modules:
                yield path, transform, part.target


def _scheme(transform: Transform, target: Target) -> Scheme | None:
    """Return the scheme of a weight that is multiplied in integers, or None."""
    if isinstance(transform, (Keep, IntegerProduct)):
        return None
    scheme = scheme_of(transform, target)
    if scheme is None or not onnx_graph.takes_blocks(scheme):
        return None
    in_float = scheme.bits == 2 and scheme.group_size == onnx_graph.LEAST_BLOCK
    return None if in_float else scheme


def _rounding(size: int) -> Any:
    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_in_blocks(given[0], size), *given[1:])

    return hook
