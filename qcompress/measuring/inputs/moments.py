"""Second moments of layer inputs, for factors and codes that minimise the loss on the calibration data.

One pass over the data sums ``x·xᵀ`` over every input row of the layers that need it (for a convolution: every patch of
the padded input that its kernel is applied to). Per such layer this takes one square float64 matrix of the size of its
weights per channel, on the layer's device; no activations are kept. For very wide layers only blocks of the matrix are
collected (`qcompress.transforms.column_blocks`). The input of an Embedding is a word, and its moments are the
frequencies of the words.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.function_transforms import outside_transforms
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.captured import products_of
from qcompress.model.padding import real_inputs
from qcompress.model.parts import Part
from qcompress.model.tensors import dense
from qcompress.transforms.column_blocks import block_size, products, spans

FREQUENCIES = "word_frequencies"  # attribute of an Embedding: (words,) float32, if they are known beforehand
CHUNK = 1 << 22  # numbers of unfolded input that are held at the same time


def forecast_bytes(parts: Iterable[Part]) -> dict[str, int]:
    """Bound the memory for the moments of parts from above, by the path of their first module: sums, then means.

    >>> from qcompress.transforms.base import Target
    >>> target = Target(layer="Linear", channels=4, per_channel=1000, dtype=torch.float32, macs=0)
    >>> forecast_bytes([Part(name="fc", modules=("fc",), rows=None, target=target)])
    {'fc': 12000000}
    """
    sizes = {}
    for part in parts:
        embedded = part.target.layer == "Embedding" and not part.target.head
        width, groups = part.target.per_channel, part.target.input_groups
        blocks = len(spans(width)) * block_size(width) ** 2 if groups == 1 else groups * width**2
        sizes[part.modules[0]] = 12 * (part.target.channels if embedded else blocks)
    return sizes


def second_moments(
    model: nn.Module, parts: Iterable[Part], data: Iterable[Any], forward: forwards.Forward | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Compute ``E[x xᵀ]`` of the inputs of parts' layers: ``(per_channel, per_channel)`` float32 on the CPU.

    Layers with identical inputs, such as those of queries, keys and values, share one matrix. For an Embedding the
    result is the diagonal ``(channels,)``, or the moments of the Linear layers that share its weight; for a grouped
    convolution ``(groups, per_channel, per_channel)``; for a very wide layer blocks of columns
    (`qcompress.transforms.column_blocks`). A block of a vocabulary has its frequencies from `split_vocabulary_`.

    Args:
        model: same as in `measure`.
        parts: parts of Linear, Embedding or convolution layers; layers that share a weight are averaged together.
        data: batches.
        forward: how to run a batch.

    Returns:
        The moments by the path of a part's first module, and the numbers of inputs they are averaged over.

    Raises:
        DataError: the inputs of a layer are not finite, or a layer was not called.
    """
    wanted = list(dict.fromkeys(part.modules for part in parts))
    known = {
        modules[0]: frequencies
        for modules in wanted
        if (frequencies := getattr(model.get_submodule(modules[0]), FREQUENCIES, None)) is not None
    }
    wanted = [modules for modules in wanted if modules[0] not in known]
    together = _with_same_inputs(model, wanted, islice(data, 1), forward)
    while True:
        sums = _summed(model, wanted, together, data, forward)
        if not sums.parted:
            break
        together = {name: name if leader in sums.parted else leader for name, leader in together.items()}
    for modules in wanted:
        if together[modules[0]] not in sums.totals:
            raise DataError(
                f"{modules[0]!r} was called in the first pass over the data but not in a later one: the data must be "
                "the same in every pass"
            )
    for name, total in sums.totals.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(
                f"the inputs of {name!r} are not finite on the calibration data; do not offer whitened factors or "
                "compensated bits"
            )
    means = {}
    for name in list(sums.totals):
        means[name] = (sums.totals.pop(name) / max(sums.counts[name], 1)).float().cpu()
    shared = {name: means[leader] for name, leader in together.items()}
    return known | shared, {name: sums.counts[leader] for name, leader in together.items()}


@dataclass(slots=True)
class _Inputs:
    """Detects whether a layer is given the same tensor as the layer called just before it."""

    given: Tensor | None = None
    version: int = -1
    name: str = ""
    number: int = 0

    def number_of(self, name: str, given: Tensor) -> int:
        """Return a number that consecutive calls with the same input have in common."""
        version = -1 if given.is_inference() else given._version  # and nothing shows whether it was overwritten
        if given is not self.given or version != self.version or version == -1:
            self.given, self.version, self.name, self.number = given, version, name, self.number + 1
        return self.number


@dataclass(slots=True)
class _Summed:
    """Sums over the data by the first of the layers that share them; ``parted``: first layers found not to share."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    parted: set[str] = field(default_factory=set)


def _with_same_inputs(
    model: nn.Module, wanted: list[tuple[str, ...]], data: Iterable[Any], forward: forwards.Forward | None
) -> dict[str, str]:
    """Path of a layer → path of the first layer that has exactly the same inputs."""
    inputs = _Inputs()
    seen: dict[str, list[int]] = {modules[0]: [] for modules in wanted}
    linear = [
        modules[0]
        for modules in wanted
        if len(modules) == 1
        and isinstance(module := model.get_submodule(modules[0]), nn.Linear)
        and layers.is_plain(module)
    ]

    def note(name: str, module: nn.Module, given: Tensor, real: Tensor | None) -> None:  # noqa: ARG001
        seen[name].append(inputs.number_of(name, given))

    listen(model, {path: (path,) for path in linear}, data, forward, note)
    first: dict[tuple[int, ...], str] = {}
    leaders = {name: first.setdefault(tuple(seen[name]), name) for name in linear if seen[name]}
    return {modules[0]: leaders.get(modules[0], modules[0]) for modules in wanted}


def _summed(
    model: nn.Module,
    wanted: list[tuple[str, ...]],
    together: dict[str, str],
    data: Iterable[Any],
    forward: forwards.Forward | None,
) -> _Summed:
    sums, inputs = _Summed(), _Inputs()
    last: dict[str, int] = {}  # layer → number of the input that it last shared
    heads = {
        modules[0] for modules in wanted if any(isinstance(model.get_submodule(path), nn.Linear) for path in modules)
    }

    def add(name: str, module: nn.Module, given: Tensor, real: Tensor | None) -> None:
        leader = together[name]
        if isinstance(module, nn.Embedding) and name in heads:
            return
        if isinstance(module, nn.Embedding):
            given = given if real is None else given[real]
            seen = torch.bincount(given.flatten(), minlength=module.num_embeddings).double()
            sums.totals[name] = sums.totals[name] + seen if name in sums.totals else seen
            sums.counts[name] = sums.counts.get(name, 0) + given.numel()
            return
        number = inputs.number_of(name, given)
        if leader != name:
            if last.get(leader) != number or last.get(name) == number:
                sums.parted.add(leader)
            last[name] = number
            return
        last[name] = number
        given = given.detach()  # the model may compute gradients itself
        for rows in input_rows(module, given if real is None else given[real]):
            batch_sums = products(rows)
            if name not in sums.totals:
                sums.totals[name] = torch.zeros_like(batch_sums, dtype=torch.float64)
                sums.counts[name] = 0
            sums.totals[name] += batch_sums
            sums.counts[name] += rows.shape[-2]

    listen(model, {modules[0]: modules for modules in wanted}, data, forward, add)
    return sums


def listen(
    model: nn.Module,
    modules: Mapping[str, Iterable[str]],
    data: Iterable[Any],
    forward: forwards.Forward | None,
    note: Callable[[str, nn.Module, Tensor, Tensor | None], None],
) -> None:
    """Run the model on all batches; call ``note(name, module, input, real)`` for every call of the modules of a name.

    ``real`` says which positions of the input are real, None if all are (`qcompress.model.padding`).

    Args:
        model: any module.
        modules: paths of modules by name.
        data: batches.
        forward: how to run a batch.
        note: what to call.
    """
    hooks = []
    batch: Any = None
    for name, paths in modules.items():

        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            with outside_transforms(dense(args[0] if args else kwargs["input"])) as (given,):
                note(name, module, given, real_inputs(batch, module, given))

        hooks += [model.get_submodule(path).register_forward_pre_hook(hear, with_kwargs=True) for path in paths]
    try:
        with torch.no_grad():
            for batch in data:
                forwards.run(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()


def input_rows(module: nn.Module, given: Tensor) -> Iterable[Tensor]:
    """Return what a layer's weight rows are multiplied with, as ``(positions, per_channel)``, a chunk at a time.

    For a grouped convolution ``(groups, positions, per_channel)``. A transposed convolution is treated as a convolution
    with the flipped kernel over the input with zeros inserted between its positions. The input may be one sample
    without a dimension of samples, or have further dimensions before it.

    >>> [rows.tolist() for rows in input_rows(nn.Conv2d(1, 1, (1, 2)), torch.tensor([[[[1.0, 2.0, 3.0]]]]))]
    [[[1.0, 2.0], [2.0, 3.0]]]
    """
    if isinstance(module, (*layers.CONVOLUTIONS, *layers.TRANSPOSED)):
        given = given.reshape(-1, *given.shape[-1 - len(module.kernel_size) :])
    if isinstance(module, layers.TRANSPOSED):
        yield from _patches(*_spread_out(module, given), module.groups, turned=True)
        return
    if not isinstance(module, layers.CONVOLUTIONS):
        if not layers.is_plain(module):
            (product,) = products_of(module, (given,), {})
            given = product.input
        wide = given.to(torch.promote_types(given.dtype, torch.float32))
        if wide.is_nested:  # samples of different lengths, as in PyTorch's encoder with a padding mask
            wide = torch.cat(wide.unbind())
        yield from torch.split(wide.flatten(0, -2) if wide.ndim > 1 else wide[None], max(1, CHUNK // wide.shape[-1]))
        return
    (product,) = products_of(module, (given,), {})  # of the padded input, however it was padded
    samples, kernel = product.input.to(torch.promote_types(given.dtype, torch.float32)), module.kernel_size
    steps, widths = (_each(value, len(kernel)) for value in (product.stride, product.dilation))
    padded = nn.functional.pad(samples, _padding(product.padding, kernel, widths))
    yield from _patches(padded, kernel, steps, widths, product.groups)


def _patches(
    padded: Tensor,
    kernel: tuple[int, ...],
    steps: tuple[int, ...],
    widths: tuple[int, ...],
    groups: int,
    *,
    turned: bool = False,
) -> Iterator[Tensor]:
    """Yield the patches of an input ``(samples, channels, …)`` at all positions of a kernel, see `input_rows`."""
    sides = range(-len(kernel), 0)
    for chunk in torch.split(padded, max(1, CHUNK // (math.prod(kernel) * padded.shape[1:].numel()))):
        patches = chunk  # (samples, channels, positions…); each pass appends one side of the kernel
        for dim, (size, step, width) in enumerate(zip(kernel, steps, widths, strict=True), start=2):
            patches = patches.unfold(dim, width * (size - 1) + 1, step)[..., ::width]
        patches = patches.flip(tuple(sides)) if turned else patches
        rows = patches.movedim(1, 1 + len(kernel)).flatten(0, len(kernel)).flatten(1)
        yield rows if groups == 1 else rows.view(len(rows), groups, -1).movedim(1, 0)


def _spread_out(module: Any, given: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Rewrite a transposed convolution as a plain one: its input, kernel, stride and dilation."""
    kernel, widths, steps = module.kernel_size, module.dilation, module.stride
    samples = given.to(torch.promote_types(given.dtype, torch.float32))
    places = [(size - 1) * step + 1 for size, step in zip(samples.shape[2:], steps, strict=True)]
    apart = samples.new_zeros(*samples.shape[:2], *places)
    between: tuple[slice, ...] = tuple(slice(None, None, step) for step in steps)
    apart[(slice(None), slice(None), *between)] = samples
    margins: list[int] = []
    for size, width, padding, more in zip(kernel, widths, module.padding, module.output_padding, strict=True):
        margin = width * (size - 1) - padding
        margins = [margin, margin + more, *margins]
    return nn.functional.pad(apart, margins), kernel, (1,) * len(kernel), widths


def _each(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return the zeros before and after each side, last side first, in the order that ``pad`` expects."""
    if padding == "same":
        totals = [width * (size - 1) for size, width in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(each, each) for each in _each(0 if padding == "valid" else padding, len(kernel))]
    return [number for side in reversed(sides) for number in side]
