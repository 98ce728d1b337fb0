"""Compensated codes of very wide rows, whose inputs' second moments are known within blocks of columns only.

Errors of weights in different blocks do not compensate each other. Groups of weights lie within blocks, so that blocks
are independent; only if a whole row shares one scale is that scale fitted to all blocks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.transforms.quantize import compensation
from qcompress.transforms.quantize.compensation import (
    ROUNDS,
    best_of,
    descend,
    inverse_factor,
    residual,
    round_in_order,
    shrunk,
)
from qcompress.transforms.quantize.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnBlock:
    """A block of columns with the second moments of its inputs.

    Attributes:
        columns: range of the columns.
        curvature: ``(n, n)`` float64 result of `compensation.shrunk`, positive definite.
        ordered: result of `compensation.inverse_factor` for the curvature.
    """

    columns: slice
    curvature: Tensor
    ordered: tuple[Tensor, Tensor]


def blocks_of(moments: Tensor, width: int, num_inputs: float) -> list[ColumnBlock]:
    """Return the blocks of ``width`` columns whose inputs are not always zero.

    Args:
        moments: ``(blocks, size, size)``, or ``(n, n)`` for a single block.
        width: number of columns.
        num_inputs: number of inputs that the moments were computed from.
    """
    blocks, size = [], moments.shape[-1]
    for index, block_moments in enumerate(moments.view(-1, size, size)):
        columns = slice(index * size, min((index + 1) * size, width))
        inputs = columns.stop - columns.start
        curvature = shrunk(block_moments[:inputs, :inputs], num_inputs)
        if bool(curvature.any()):
            blocks.append(ColumnBlock(columns=columns, curvature=curvature, ordered=inverse_factor(curvature)))
    return blocks


def compensated_in_blocks(
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, blocks: Sequence[ColumnBlock]
) -> tuple[Tensor, Tensor]:
    """Return better codes ``(channels, n)`` and scales ``(channels, groups)``; see `compensation.compensated`."""
    width = rows.shape[1]
    if len(blocks) == 1 and blocks[0].columns == slice(0, width):
        return compensation.compensated(rows, codes, grid, kept, blocks[0].curvature, blocks[0].ordered)
    if grid.group_size >= width:
        return _with_one_scale(rows, codes, grid, kept, blocks)
    codes, scales = codes.clone(), grid.scales.clone()
    for block in blocks:
        columns, size = block.columns, grid.group_size
        groups = slice(columns.start // size, -(-columns.stop // size))
        codes[:, columns], scales[:, groups] = compensation.compensated(
            rows[:, columns].contiguous(), codes[:, columns].contiguous(), grid.of_groups(groups),
            kept[:, columns].contiguous(), block.curvature, block.ordered,
        )  # fmt: skip
    return codes, scales


def _with_one_scale(
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, blocks: Sequence[ColumnBlock]
) -> tuple[Tensor, Tensor]:
    """Do the steps of `compensation.compensated` for each block, and fit the scales to all blocks together."""
    grid = replace(grid, scales=grid.scales.contiguous().clone())
    metrics = [block.curvature.float() for block in blocks]
    parts = [rows[:, block.columns].contiguous() for block in blocks]
    opened = [kept[:, block.columns].contiguous() for block in blocks]
    block_codes = [
        best_of(part, nearest, round_in_order(part, grid, free, block.ordered), grid, metric)
        for part, nearest, free, block, metric in zip(
            parts, (codes[:, block.columns] for block in blocks), opened, blocks, metrics, strict=True
        )
    ]
    for last in (*[False] * ROUNDS, True):
        _refit_scale(parts, block_codes, grid, metrics)
        if not last:
            for part, part_codes, free, metric in zip(parts, block_codes, opened, metrics, strict=True):
                descend(part_codes, grid, free, residual(part, part_codes, grid) @ metric, metric)
    codes = codes.clone()
    for block, part_codes in zip(blocks, block_codes, strict=True):
        codes[:, block.columns] = part_codes
    return codes, grid.scales


def _refit_scale(parts: list[Tensor], block_codes: list[Tensor], grid: Grid, metrics: list[Tensor]) -> None:
    """Set the scale of every row, in place, to the best one that can be stored if that is better."""
    scale = grid.scales[:, 0]
    products, squares = torch.zeros_like(scale), torch.zeros_like(scale)
    for part, codes, metric in zip(parts, block_codes, metrics, strict=True):
        weighted = codes @ metric
        products += (residual(part, codes, grid) * weighted).sum(1)
        squares += (codes * weighted).sum(1)
    wanted = grid.storable(torch.where(squares > 0, scale + products / squares, scale))
    step = wanted - scale
    scale += torch.where((step * (2 * products - step * squares) > 0) & (wanted != 0), step, 0.0)
