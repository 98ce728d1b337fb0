"""Check on the first sample that the outputs of a unit follow its gradients, see `gradient_check`.

A unit is a block, or everything before or after the blocks. The gradient of the hidden states that enter it is checked
as well: all effects of the units before it depend on that.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.measuring.memory import return_free_memory
from qcompress.measuring.methods import evidence
from qcompress.measuring.methods.gradient_check import misleading, widened
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.batches import as_float32
from qcompress.model.parts import Part

Output = Callable[[Tensor], Tensor]
"""Function from the hidden states of the first sample to the output of a unit."""


def misled(sweep: BlockSweep, parts: Sequence[Part], block: int, output: Output) -> set[str]:
    """Return the names of the parts whose gradient the outputs of their unit do not follow.

    A weight outside the blocks that is larger than a block is left out, so that the check needs no more memory.

    Args:
        sweep: the samples.
        parts: the parts of the unit, whose weights are in memory.
        block: index of the block; the number of blocks for what is after them, and -1 for what is before them.
        output: function that runs the unit on the first sample.

    Raises:
        ModelError: the outputs do not follow the gradient of the hidden states.
    """
    names: dict[nn.Parameter, set[str]] = {}
    for part in parts:
        names.setdefault(part.site(sweep.model).weight, set()).add(part.name)
    largest = max(map(sweep.opened.block_bytes, sweep.opened.blocks))
    weights = [weight for weight in names if weight.nbytes <= largest]
    inside = 0 <= block < len(sweep.chain)
    hidden = sweep.hidden(max(block, 0), 0)
    with widened(sweep.model.get_submodule(sweep.opened.blocks[block]) if inside else nn.Module()) as wide:
        entering = nn.Parameter(as_float32(hidden) if wide else hidden)
        moved = [*weights, *([] if block < 0 else [entering])]
        try:
            wrong = misleading(lambda: output(entering), moved, torch.Generator().manual_seed(0))
        except RuntimeError as error:
            if forwards.is_out_of_memory(error):
                raise
            if _runs(output, entering, wide=wide):
                raise ModelError(f"{evidence.without_gradients(error)}: load the model into memory") from error
            wrong = []  # the block's own code asks for half precision, so it cannot be checked in float32
    return_free_memory()
    if len(weights) in wrong:
        place = repr(sweep.opened.blocks[block]) if inside else "what follows the blocks"
        raise ModelError(
            f"the outputs of {place} do not follow the gradient of its inputs (a path is detached or rounded), so "
            "nothing before it can be measured block by block: load the model into memory"
        )
    return set().union(*(names[weights[index]] for index in wrong))


@torch.no_grad()
def _runs(output: Output, entering: Tensor, *, wide: bool) -> bool:
    """Whether a unit runs without gradients; if it is not in float32 for the check, its error is raised."""
    try:
        output(entering)
    except RuntimeError as error:
        if not wide or forwards.is_out_of_memory(error):
            raise
        return False
    return True
