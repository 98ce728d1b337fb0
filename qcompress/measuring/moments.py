"""Second moments of what goes into a layer, for factors and codes that lose least on the calibration data.

One pass over the data adds up ``x·xᵀ`` of every input row of a layer (for a convolution: every patch of the padded
input, as its kernel sees it), for the layers that ask for it only. Memory is one float64 matrix of the square of a
layer's weights per channel, per such layer, on the layer's device; no activations are kept. Of an Embedding the
input is a word, and the moments are the words' frequencies.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.parts import Part

FREQUENCIES = "word_frequencies"  # attribute of an Embedding: (words,) float32, where they are known beforehand
CHUNK = 1 << 22  # numbers of unfolded input that are held at once


def second_moments(
    model: nn.Module, parts: Iterable[Part], data: Iterable[Any], forward: forwards.Forward | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """``E[x xᵀ]`` of what goes into the layers of parts: ``(per_channel, per_channel)`` float32 on the CPU.

    Of an Embedding ``(channels,)``: the diagonal. A block of a vocabulary has its frequencies from `split_vocabulary_`.

    Args:
        model: as in `measure`.
        parts: of Linear, Embedding or ungrouped convolution layers; over layers that share a weight it is one mean.
        data: batches.
        forward: how to run one.

    Returns:
        The moments by the path of a part's first module, and of how many inputs they are the mean.

    Raises:
        DataError: what goes into a layer is not finite, or a layer was not called.
    """
    sums: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    wanted = dict.fromkeys(part.modules for part in parts)
    for modules in wanted:
        name = modules[0]
        if (frequencies := getattr(model.get_submodule(name), FREQUENCIES, None)) is not None:
            known[name] = frequencies
            continue

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            given = (args[0] if args else kwargs["input"]).detach()
            if isinstance(module, nn.Embedding):
                seen = torch.bincount(given.flatten(), minlength=module.num_embeddings).double()
                sums[name] = sums[name] + seen if name in sums else seen
                counts[name] = counts.get(name, 0) + given.numel()
                return
            for rows in input_rows(module, given):
                if name not in sums:
                    sums[name] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
                    counts[name] = 0
                sums[name] += rows.T @ rows
                counts[name] += len(rows)

        hooks += [model.get_submodule(path).register_forward_pre_hook(add, with_kwargs=True) for path in modules]
    try:
        with torch.no_grad():
            for batch in data:
                forwards.run(model, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    for name, *_ in wanted:
        if name not in sums and name not in known:
            raise DataError(
                f"{name!r} was called in the first pass over the data and not in another: data has to be the same "
                "every time it is gone through"
            )
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(
                f"what goes into {name!r} is not finite on the calibration data; do not offer whitened factors or "
                "compensated bits"
            )
    means = {name: (total / max(counts[name], 1)).float().cpu() for name, total in sums.items()}
    return known | means, counts


def input_rows(module: nn.Module, given: Tensor) -> Iterable[Tensor]:
    """What a layer's weight rows are multiplied with, as ``(positions, per_channel)``, a chunk at a time.

    >>> [rows.tolist() for rows in input_rows(nn.Conv2d(1, 1, (1, 2)), torch.tensor([[[[1.0, 2.0, 3.0]]]]))]
    [[[1.0, 2.0], [2.0, 3.0]]]
    """
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    if not isinstance(module, layers.CONVOLUTIONS):
        if wide.is_nested:  # samples of several lengths, as PyTorch's encoder has them with a padding mask
            wide = torch.cat(wide.unbind())
        yield from torch.split(wide.flatten(0, -2), max(1, CHUNK // wide.shape[-1]))
        return
    kernel = module.kernel_size
    samples = wide if wide.ndim == 2 + len(kernel) else wide[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(samples, module._reversed_padding_repeated_twice, mode=mode)
    for chunk in torch.split(padded, max(1, CHUNK // (math.prod(kernel) * padded.shape[1:].numel()))):
        patches = chunk  # (samples, channels, places…), then with each turn a kernel's side at the end
        for dim, (size, step, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, step)[..., ::dilation]
        yield patches.movedim(1, 1 + len(kernel)).flatten(0, len(kernel)).flatten(1)
