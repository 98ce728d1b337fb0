"""Second moments of very wide layers: blocks of columns, each with all that its own inputs have in common.

A matrix ``E[x·xᵀ]`` of 65,536 inputs takes 34 GB. Above `MAX_INPUTS` only the products of inputs within a block of up
to `BLOCK_INPUTS` neighbours are kept, ``(blocks, size, size)``: what two blocks have in common is left out, as if they
were independent. Blocks are alike in size, in steps of `STEP` so that groups of weights do not straddle them; the last
one is filled up with zeros.
"""

import torch
from torch import Tensor

MAX_INPUTS = 16384  # weights a channel up to which there is one matrix: 2 GB of sums
BLOCK_INPUTS = 4096
STEP = 256


def block_size(num_inputs: int) -> int:
    """Columns of a block of a layer with so many inputs.

    >>> block_size(768), block_size(25088), block_size(65536)
    (768, 3584, 4096)
    """
    if num_inputs <= MAX_INPUTS:
        return num_inputs
    blocks = -(-num_inputs // BLOCK_INPUTS)
    return -(-num_inputs // (blocks * STEP)) * STEP


def spans(num_inputs: int) -> list[slice]:
    """The columns of each block.

    >>> [(own.start, own.stop) for own in spans(25088)][-1]
    (21504, 25088)
    """
    size = block_size(num_inputs)
    return [slice(start, min(start + size, num_inputs)) for start in range(0, num_inputs, size)]


def products(rows: Tensor) -> Tensor:
    """``Σ x·xᵀ`` of input rows ``(positions, n)``: ``(n, n)``, or ``(blocks, size, size)`` of wide ones.

    Of a grouped convolution's ``(groups, positions, n)`` it is ``(groups, n, n)``.
    """
    own = spans(rows.shape[-1])
    if rows.ndim > 2 or len(own) == 1:
        return rows.mT @ rows
    size = block_size(rows.shape[-1])
    found = rows.new_zeros(len(own), size, size)
    for place, columns in enumerate(own):
        width = columns.stop - columns.start
        found[place, :width, :width] = rows[:, columns].T @ rows[:, columns]
    return found


def times(rows: Tensor, moments: Tensor) -> Tensor:
    """``rows @ moments`` for rows ``(channels, n)`` and moments as `products` gives them.

    >>> times(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    tensor([[1., 3.]])
    """
    if moments.ndim == 2:
        return rows @ moments
    blocks, size, _ = moments.shape
    filled = torch.nn.functional.pad(rows, (0, blocks * size - rows.shape[1]))
    found = filled.view(len(rows), blocks, size).movedim(1, 0) @ moments
    return found.movedim(0, 1).reshape(len(rows), -1)[:, : rows.shape[1]]
