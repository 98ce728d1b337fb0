"""Codes of ggml's linear formats that make up for each other's errors, in the scales that ggml found.

ggml rounds every weight by itself. Here the codes are chosen as `qcompress.transforms.quantize.compensation` does, on
the second moments of the layer's inputs; a format whose blocks have one scale of their own gets it refitted, rounded as
it is stored. What always holds: the same bytes, and no row loses more than ggml's by the moments as they are taken
there.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.codes import FORMATS, lines, put, with_scales
from qcompress.transforms.quantize import compensation
from qcompress.transforms.quantize.grid import Grid, spread
from qcompress.transforms.quantize.prune_quantize import nonzero


def compensated(
    name: str, rows: NDArray[np.float32], blocks: NDArray[np.uint8], curvature: Tensor, ordered: tuple[Tensor, Tensor]
) -> NDArray[np.uint8]:
    """Better blocks.

    Args:
        name: of a linear format.
        rows: ``(channels, n)`` weights.
        blocks: ``(channels, bytes of a row)`` as ggml encodes them.
        curvature: of the inputs, as `compensation.shrunk` gives it.
        ordered: of that, as `compensation.in_order` gives it.
    """
    kind, length = FORMATS[name], rows.shape[1]
    offset, steps = lines(name, blocks, length)
    zero = kind.zero or 0
    scales = torch.from_numpy(steps)
    low = torch.full_like(scales, float(-zero))
    grid = Grid(
        scales=scales,
        low=low,
        high=low + (kind.levels - 1),
        group_size=kind.group,
        storable=_half if kind.free else torch.zeros_like,  # a scale of 0 is never taken: they stay
    )
    wanted = torch.from_numpy(rows if kind.zero is not None else rows - offset)
    wide = spread(scales, kind.group, length)
    above = torch.from_numpy(library.decode(name, blocks, length) - offset)
    codes = torch.where(wide == 0, 0.0, (above / nonzero(wide)).round() - zero)
    sizes = torch.ldexp(torch.ones(len(rows)), torch.frexp(nonzero(wanted.abs().amax(dim=1))).exponent - 1)
    everything = torch.ones(wanted.shape, dtype=torch.bool)
    codes, scales = compensation.compensated(
        wanted / sizes[:, None], codes, grid.of_size(sizes), everything, curvature, ordered
    )
    if kind.free:
        blocks = with_scales(name, blocks, (scales * sizes[:, None]).numpy())
    return put(name, blocks, (codes + zero).numpy().astype(np.uint8))


def _half(scales: Tensor) -> Tensor:
    limit = torch.finfo(torch.float16).max
    return scales.clamp(-limit, limit).to(torch.float16).to(torch.float32)
