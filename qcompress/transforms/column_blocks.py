"""Second moments of very wide layers, in blocks of columns.

A matrix ``E[x·xᵀ]`` of 65,536 inputs takes 34 GB. Above `MAX_INPUTS` only the products of inputs within a block of up
to `BLOCK_INPUTS` neighbours are stored, ``(blocks, size, size)``; inputs in different blocks are treated as
independent. All blocks have the same size, a multiple of `STEP` so that no group of weights straddles two blocks; the
last block is padded with zeros.
"""

import torch
from torch import Tensor

MAX_INPUTS = 16384  # most weights per channel for a single matrix: 2 GB of sums
BLOCK_INPUTS = 4096
STEP = 256


def block_size(num_inputs: int) -> int:
    """Return the number of columns of a block in a layer with ``num_inputs`` inputs.

    >>> block_size(768), block_size(25088), block_size(65536)
    (768, 3584, 4096)
    """
    if num_inputs <= MAX_INPUTS:
        return num_inputs
    blocks = -(-num_inputs // BLOCK_INPUTS)
    return -(-num_inputs // (blocks * STEP)) * STEP


def spans(num_inputs: int) -> list[slice]:
    """Return the columns of each block.

    >>> [(columns.start, columns.stop) for columns in spans(25088)][-1]
    (21504, 25088)
    """
    size = block_size(num_inputs)
    return [slice(start, min(start + size, num_inputs)) for start in range(0, num_inputs, size)]


def products(rows: Tensor) -> Tensor:
    """Return ``Σ x·xᵀ`` of input rows ``(positions, n)``: ``(n, n)``, or ``(blocks, size, size)`` for wide rows.

    For rows ``(groups, positions, n)`` of a grouped convolution, the result is ``(groups, n, n)``.
    """
    blocks = spans(rows.shape[-1])
    if rows.ndim > 2 or len(blocks) == 1:
        return rows.mT @ rows
    size = block_size(rows.shape[-1])
    sums = rows.new_zeros(len(blocks), size, size)
    for index, columns in enumerate(blocks):
        width = columns.stop - columns.start
        sums[index, :width, :width] = rows[:, columns].T @ rows[:, columns]
    return sums


def times(rows: Tensor, moments: Tensor) -> Tensor:
    """Return ``rows @ moments`` for rows ``(channels, n)`` and moments from `products`.

    >>> times(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[1., 3.]])
    """
    if moments.ndim == 2:
        return rows @ moments
    blocks, size, _ = moments.shape
    filled = torch.nn.functional.pad(rows, (0, blocks * size - rows.shape[1]))
    result = filled.view(len(rows), blocks, size).movedim(1, 0) @ moments
    return result.movedim(0, 1).reshape(len(rows), -1)[:, : rows.shape[1]]
