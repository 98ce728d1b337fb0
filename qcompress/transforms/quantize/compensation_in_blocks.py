"""Compensated codes of very wide rows, whose inputs' second moments are known in blocks of columns.

Errors of weights in different blocks do not make up for each other. Groups of weights lie within blocks, which then
have nothing in common; where a whole row has one scale, that is fitted to all of them together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompress.transforms.quantize import compensation
from qcompress.transforms.quantize.compensation import ROUNDS, best_of, descend, in_order, made_up, residual, shrunk
from qcompress.transforms.quantize.grid import Grid


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Columns, and what is known of their inputs.

    Attributes:
        columns: of the rows.
        curvature: ``(n, n)`` float64, as `compensation.shrunk` gives it, positive definite.
        ordered: of that, as `compensation.in_order` gives it.
    """

    columns: slice
    curvature: Tensor
    ordered: tuple[Tensor, Tensor]


def blocks_of(moments: Tensor, width: int, num_inputs: float) -> list[Block]:
    """The blocks of moments ``(blocks, size, size)``, or ``(n, n)``, of so many columns that ever see anything."""
    found, size = [], moments.shape[-1]
    for place, own in enumerate(moments.view(-1, size, size)):
        columns = slice(place * size, min((place + 1) * size, width))
        inputs = columns.stop - columns.start
        curvature = shrunk(own[:inputs, :inputs], num_inputs)
        if bool(curvature.any()):
            found.append(Block(columns=columns, curvature=curvature, ordered=in_order(curvature)))
    return found


def compensated(
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor]:
    """Better codes ``(channels, n)`` and scales ``(channels, groups)``; arguments as of `compensation.compensated`."""
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
    rows: Tensor, codes: Tensor, grid: Grid, kept: Tensor, blocks: Sequence[Block]
) -> tuple[Tensor, Tensor]:
    """The steps of `compensation.compensated`, of which only that of the scales knows of all blocks."""
    grid = replace(grid, scales=grid.scales.contiguous().clone())
    metrics = [block.curvature.float() for block in blocks]
    parts = [rows[:, block.columns].contiguous() for block in blocks]
    opened = [kept[:, block.columns].contiguous() for block in blocks]
    found = [
        best_of(part, nearest, made_up(part, grid, own, block.ordered), grid, metric)
        for part, nearest, own, block, metric in zip(
            parts, (codes[:, block.columns] for block in blocks), opened, blocks, metrics, strict=True
        )
    ]
    for last in (*[False] * ROUNDS, True):
        _refit_scale(parts, found, grid, metrics)
        if not last:
            for part, own, free, metric in zip(parts, found, opened, metrics, strict=True):
                descend(own, grid, free, residual(part, own, grid) @ metric, metric)
    codes = codes.clone()
    for block, own in zip(blocks, found, strict=True):
        codes[:, block.columns] = own
    return codes, grid.scales


def _refit_scale(parts: list[Tensor], found: list[Tensor], grid: Grid, metrics: list[Tensor]) -> None:
    """The scale of every row to the best that can be stored, in place; it stays where that is no better."""
    scale = grid.scales[:, 0]
    products, squares = torch.zeros_like(scale), torch.zeros_like(scale)
    for part, codes, metric in zip(parts, found, metrics, strict=True):
        seen = codes @ metric
        products += (residual(part, codes, grid) * seen).sum(1)
        squares += (codes * seen).sum(1)
    wanted = grid.storable(torch.where(squares > 0, scale + products / squares, scale))
    step = wanted - scale
    scale += torch.where((step * (2 * products - step * squares) > 0) & (wanted != 0), step, 0.0)
